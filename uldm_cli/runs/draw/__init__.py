"""Arrays to pictures. Nothing here knows torch: arrays come in, 8-bit arrays go out."""
