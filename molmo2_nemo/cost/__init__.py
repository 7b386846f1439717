"""What a step computes, sends and takes: FLOPs, bytes, rates, hardware, seconds."""
