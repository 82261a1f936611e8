"""Pictures whose colours are named by number as sRGB: wide colours, linear light, and high dynamic range.

PQ and HLG signals (ITU-R BT.2100) have their tones above white rolled off.

Diffuse white is 203 candela per square metre (ITU-R BT.2408); what is darker keeps its light, what is brighter is
squeezed below the brightest value without changing its hue.
"""

import numpy as np

PQ, HLG = 16, 18
"""Numbers of the transfer functions in ITU-T H.273."""

GAMMAS = {4: 2.2, 5: 2.8, 8: 1.0}
"""Transfer functions of ITU-T H.273 that are a power of the signal."""

LIKE_SRGB = (1, 6, 13, 14, 15)
"""Those of sRGB, and of video, which screens show with sRGB's."""

WHITE = 203.0
"""Diffuse white in candela per square metre."""

HLG_PEAK = 1000.0
"""Brightest value of the display HLG is meant for, in candela per square metre."""

KNEE = 0.75
"""Light, in units of diffuse white, from which on tones are squeezed."""

PRIMARIES = {
    1: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
"""Number in ITU-T H.273 -> chromaticities of red, green and blue: BT.709 (as sRGB), BT.2020, Display P3."""

D65 = (0.3127, 0.3290)

PIXELS_AT_ONCE = 2**18
"""Pixels mapped together, so that memory stays small beside a large picture's own."""


def to_srgb(pixels: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """Map tones and colours.

    Args:
        pixels: Signal values, shape `(H, W, 3)`, uint8 or uint16.
        transfer: `PQ`, `HLG`, a number in `GAMMAS` or in `LIKE_SRGB`.
        primaries: A number in `PRIMARIES`.

    Returns:
        sRGB, shape `(H, W, 3)`, uint8.
    """
    full_scale = np.iinfo(pixels.dtype).max
    signal = np.arange(full_scale + 1, dtype=np.float32) / full_scale
    light_of = light_of_signal(signal, transfer).astype(np.float32)
    matrix = (np.linalg.inv(rgb_to_xyz(1)) @ rgb_to_xyz(primaries)).astype(np.float32)
    luminance = rgb_to_xyz(primaries)[1].astype(np.float32)
    mapped = np.empty(pixels.shape, dtype=np.uint8)
    rows = max(1, PIXELS_AT_ONCE // pixels.shape[1])
    for start in range(0, len(pixels), rows):
        light = light_of[pixels[start : start + rows]]
        if transfer == HLG:  # the display brightens by what the whole pixel shines, not channel by channel
            light = light * HLG_PEAK * (light @ luminance)[..., None].clip(1e-9) ** 0.2
        if transfer in (PQ, HLG):
            light = roll_off((light / WHITE @ matrix.T).clip(0))
        else:
            light = (light @ matrix.T).clip(0, 1)
        mapped[start : start + rows] = encode(light)
    return mapped


def names_other_than_srgb(primaries: int, transfer: int) -> bool:
    """Whether known numbers of ITU-T H.273 stand for colours of ordinary range that are not sRGB."""
    is_known = primaries in PRIMARIES and (transfer in GAMMAS or transfer in LIKE_SRGB)
    return is_known and not (primaries == 1 and transfer in LIKE_SRGB)


def light_of_signal(signal: np.ndarray, transfer: int) -> np.ndarray:
    """Light of a signal in 0..1: of PQ in candela per square metre, otherwise in 0..1."""
    if transfer == PQ:
        return pq_light(signal)
    if transfer == HLG:
        return hlg_scene(signal)
    if transfer in GAMMAS:
        return signal ** GAMMAS[transfer]
    return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)


def pq_light(signal: np.ndarray) -> np.ndarray:
    """Light of a PQ signal in 0..1, in candela per square metre (SMPTE ST 2084)."""
    m1, m2 = 2610 / 16384, 2523 / 4096 * 128
    c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
    power = signal ** (1 / m2)
    return 10_000 * ((power - c1).clip(0) / (c2 - c3 * power)) ** (1 / m1)


def hlg_scene(signal: np.ndarray) -> np.ndarray:
    """Scene light in 0..1 of an HLG signal in 0..1."""
    a = 0.17883277
    b, c = 1 - 4 * a, 0.5 - a * np.log(4 * a)
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


def rgb_to_xyz(primaries: int) -> np.ndarray:
    """Matrix from linear RGB of some primaries to CIE XYZ, white (D65) at luminance 1; shape `(3, 3)`."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in PRIMARIES[primaries]]).T
    white = np.array([D65[0] / D65[1], 1, (1 - D65[0] - D65[1]) / D65[1]])
    return columns * np.linalg.solve(columns, white)


def roll_off(light: np.ndarray) -> np.ndarray:
    """Squeeze light above the knee below 1, by the brightest channel of each pixel; shapes `(..., 3)`."""
    brightest = light.max(axis=-1, keepdims=True)
    over = (brightest - KNEE).clip(0) / (1 - KNEE)
    squeezed = np.where(over > 0, KNEE + (1 - KNEE) * (1 - np.exp(-over)), brightest)
    return light * (squeezed / brightest.clip(1e-9))


def encode(light: np.ndarray) -> np.ndarray:
    """Linear light in 0..1 as sRGB values, uint8."""
    values = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light.clip(1e-9) ** (1 / 2.4) - 0.055)
    return np.rint(values * 255).clip(0, 255).astype(np.uint8)
