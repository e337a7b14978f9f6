"""Checksums of Ogg pages, for pages that a test makes or changes."""


def crc(page: bytes) -> int:
    """Compute RFC 3533's CRC of a page bit by bit: polynomial 0x04C11DB7, start and end at 0."""
    value = 0
    for byte in page:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ (0x04C11DB7 if value & 0x80000000 else 0)) & 0xFFFFFFFF
    return value
