"""What is caught when a video cannot be decoded."""


class FFmpegError(Exception):
    pass
