"""What a frozen vision encoder makes of a crop, kept on disk so that it is computed once."""
