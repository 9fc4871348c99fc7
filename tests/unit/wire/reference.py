"""Curve25519, BLAKE2b and Z85 as their standards write them: slow, and without the libraries that we use."""

from __future__ import annotations

import struct

# --- RFC 7748, section 5 -----------------------------------------------------------------------------

P = 2**255 - 19
A24 = 121665
BASE_POINT = (9).to_bytes(32, "little")


def x25519(scalar: bytes, u: bytes = BASE_POINT) -> bytes:
    """The Montgomery ladder."""
    k = int.from_bytes(scalar, "little") & ~7 & ~(128 << 8 * 31) | (64 << 8 * 31)
    x_1 = int.from_bytes(u, "little") % 2**255
    x_2, z_2, x_3, z_3 = 1, 0, x_1, 1
    swap = 0
    for t in reversed(range(255)):
        k_t = k >> t & 1
        if swap ^ k_t:
            x_2, x_3, z_2, z_3 = x_3, x_2, z_3, z_2
        swap = k_t
        A, B, C, D = x_2 + z_2, x_2 - z_2, x_3 + z_3, x_3 - z_3
        AA, BB, DA, CB = A * A, B * B, D * A, C * B
        E = AA - BB
        x_3, z_3 = (DA + CB) ** 2 % P, x_1 * (DA - CB) ** 2 % P
        x_2, z_2 = AA * BB % P, E * (AA + A24 * E) % P
    if swap:
        x_2, z_2 = x_3, z_3
    return (x_2 * pow(z_2, P - 2, P) % P).to_bytes(32, "little")


# --- RFC 7693, section 3 -----------------------------------------------------------------------------

IV = (
    0x6A09E667F3BCC908, 0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B, 0xA54FF53A5F1D36F1,
    0x510E527FADE682D1, 0x9B05688C2B3E6C1F, 0x1F83D9ABFB41BD6B, 0x5BE0CD19137E2179,
)  # fmt: skip
SIGMA = (
    (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
    (14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3),
    (11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4),
    (7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8),
    (9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13),
    (2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9),
    (12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11),
    (13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10),
    (6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5),
    (10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0),
)
COLUMNS_AND_DIAGONALS = (
    (0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15),
    (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14),
)  # fmt: skip
WORD = 2**64 - 1


def blake2b(data: bytes, size: int, key: bytes = b"", person: bytes = b"") -> bytes:
    """The parameter block has the personalisation in its last 16 bytes."""
    block = bytes([size, len(key), 1, 1]) + bytes(44) + person.ljust(16, b"\0")
    h = [iv ^ parameter for iv, parameter in zip(IV, struct.unpack("<8Q", block), strict=True)]
    message = (key.ljust(128, b"\0") if key else b"") + data
    chunks = [message[i : i + 128] for i in range(0, len(message), 128)] or [b""]
    for number, chunk in enumerate(chunks):
        last = number == len(chunks) - 1
        counter = len(message) if last else 128 * (number + 1)
        h = _compress(h, struct.unpack("<16Q", chunk.ljust(128, b"\0")), counter, last)
    return struct.pack("<8Q", *h)[:size]


def _compress(h: list[int], m: tuple[int, ...], counter: int, last: bool) -> list[int]:
    v = [*h, *IV]
    v[12] ^= counter
    v[14] ^= WORD if last else 0
    for round_ in range(12):
        s = SIGMA[round_ % 10]
        for i, (a, b, c, d) in enumerate(COLUMNS_AND_DIAGONALS):
            for word, (r_d, r_b) in ((m[s[2 * i]], (32, 24)), (m[s[2 * i + 1]], (16, 63))):
                v[a] = (v[a] + v[b] + word) & WORD
                v[d] = _rotated(v[d] ^ v[a], r_d)
                v[c] = (v[c] + v[d]) & WORD
                v[b] = _rotated(v[b] ^ v[c], r_b)
    return [old ^ v[i] ^ v[i + 8] for i, old in enumerate(h)]


def _rotated(word: int, bits: int) -> int:
    return (word >> bits | word << 64 - bits) & WORD


# --- ZeroMQ RFC 32 -----------------------------------------------------------------------------------

Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"


def z85(data: bytes) -> str:
    """Four bytes are five digits to the base of 85, the highest first."""
    text = ""
    for i in range(0, len(data), 4):
        value = int.from_bytes(data[i : i + 4], "big")
        text += "".join(Z85[value // 85**power % 85] for power in reversed(range(5)))
    return text
