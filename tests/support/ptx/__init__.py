"""An emulator of PTX that checks every access to memory."""
