"""Real colour profiles, written byte by byte as ICC.1:2010 lays them out: Pillow makes none but sRGB."""

import struct

import numpy as np

D50 = (0.9642, 1.0, 0.8249)


def _fixed(*values):
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _xyz(*values):
    return b"XYZ \0\0\0\0" + _fixed(*values)


def _gamma(exponent):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(exponent * 256))


def _srgb_curve():
    return b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + _fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def _profile(space, tags, kind=b"mntr", pcs=b"XYZ "):
    name = b"test\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + b"\0" * 78,
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": _xyz(*D50),
    } | tags
    offset, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for signature, data in tags.items():
        table += signature + struct.pack(">II", offset + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", offset + len(body), b"\0" * 4, 0x02400000, kind, space, pcs)
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + _fixed(*D50)
    return head.ljust(128, b"\0") + table + body


def display_p3():
    colours = {b"r": (0.51512, 0.2412, -0.00105), b"g": (0.29198, 0.69225, 0.04189), b"b": (0.1571, 0.06657, 0.78407)}
    curves = {name + b"TRC": _srgb_curve() for name in colours}
    return _profile(b"RGB ", {name + b"XYZ": _xyz(*values) for name, values in colours.items()} | curves)


def grey(gamma):
    return _profile(b"GRAY", {b"kTRC": _gamma(gamma)})


def table(space, colours):
    """A profile that is a table from the corners of the ink or colour cube to Lab, and leads one way only.

    Args:
        colours: float (2**channels, 3), L in [0, 100], a and b in [-128, 127]; the last channel changes fastest.
    """
    channels = len(space.strip())
    straight = bytes(range(256))
    nodes = np.asarray(colours) * (2.55, 1, 1) + (0, 128, 128)
    lut = b"mft1\0\0\0\0" + bytes([channels, 3, 2, 0]) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    lut += straight * channels + nodes.round().astype(np.uint8).tobytes() + straight * 3
    return _profile(space, {b"A2B0": lut}, b"scnr" if space == b"RGB " else b"prtr", b"Lab ")
