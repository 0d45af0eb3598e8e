"""An image's way to a file, against other encoders of PNG, alternately in one process.

1024 x 1024 pixels of synthetic noise with the spectrum of photographs at two strengths, and of a
picture of this project. Checks first that every file decodes to the same pixels. CPU time of the
process, the kernel's part of writing included. OpenCV takes part where it is installed; nothing
here needs it. Prints tables and, as the last line, one JSON object.
"""

import io
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from jobs.writers import Pixels, PNGWriter, decode_image, pixels_sha256, sha256

try:
    import cv2
except ImportError:
    cv2 = None

SIZE, ROUNDS = 1024, 9
LEVELS = (0, 1, 2, 3, 4, 6, 9)
PICTURE = Path(__file__).parents[2] / "docs" / "images" / "avatars.webp"
OURS, DEFAULT = "ours", "Pillow, level 6 (its default)"

Encode = Callable[[Pixels], bytes]


def main() -> int:
    """Run all cases; exit code 1 where a file does not give its pixels back."""
    if cv2 is None:
        print("OpenCV is not installed: left out")
    else:
        cv2.setNumThreads(1)
    report = {
        "benchmark": "output",
        "date": date.today().isoformat(),
        "hardware": f"{platform.processor() or platform.machine()}, 1 thread, CPU",
        "versions": {name: version(name) for name in ("pillow", "isal", "numpy")},
        "pixels": [SIZE, SIZE],
        "rounds": ROUNDS,
        "results": [],
    }
    if cv2 is not None:
        report["versions"]["opencv"] = cv2.__version__
    everything_equal = True
    with tempfile.TemporaryDirectory() as folder:
        for name, pixels in images().items():
            for group, encoders in (("encoders", peers()), ("levels", levels())):
                equal = {key: is_lossless(encode, pixels) for key, encode in encoders.items()}
                everything_equal &= all(equal.values())
                rows = measure(encoders, pixels, Path(folder))
                show(f"{name}, {group}", rows, equal)
                report["results"].append({"image": name, "group": group, "rows": rows})
            times = hashing(pixels)
            print(f"hashing, not in the above: {times}\n")
            report["results"].append({"image": name, "group": "hashing_ms", **times})
    print(json.dumps(report))
    return 0 if everything_equal else 1


def images() -> dict[str, Pixels]:
    """Pixels uint8 (H, W, 3) by name."""
    with Image.open(PICTURE) as image:
        picture = np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))
    return {
        "1/f, little noise": photograph_like(0.7),
        "1/f, more noise": photograph_like(2.0),
        "docs/images/avatars.webp": picture,
    }


def photograph_like(noise: float) -> Pixels:
    """Random amplitudes that fall as 1/f^1.2, and white noise of a standard deviation on top."""
    rng = np.random.default_rng(0)
    frequency = np.fft.fftfreq(SIZE)
    radius = np.hypot(*np.meshgrid(frequency, frequency))
    radius[0, 0] = 1
    channels = []
    for _ in range(3):
        spectrum = np.fft.fft2(rng.standard_normal((SIZE, SIZE))) / radius**1.2
        values = np.fft.ifft2(spectrum).real
        values = (values - values.min()) / (values.max() - values.min()) * 255
        channels.append(values + noise * rng.standard_normal((SIZE, SIZE)))
    return np.clip(np.stack(channels, -1), 0, 255).round().astype(np.uint8)


def peers() -> dict[str, Encode]:
    """What is compared."""
    encoders = {OURS: PNGWriter().encode, DEFAULT: pillow(6), "Pillow, level 1": pillow(1)}
    if cv2 is not None:
        encoders["OpenCV, its default"] = opencv
    return encoders


def levels() -> dict[str, Encode]:
    """All that `output.png_level` can ask for, or nearly."""
    return {f"png_level {level}": PNGWriter(level).encode for level in LEVELS}


def pillow(level: int) -> Encode:
    """Pillow at a level of zlib."""

    def encode(pixels: Pixels) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=level)
        return buffer.getvalue()

    return encode


def opencv(pixels: Pixels) -> bytes:
    """OpenCV, which takes channels in the order BGR."""
    done, content = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    assert done
    return content.tobytes()


def is_lossless(encode: Encode, pixels: Pixels) -> bool:
    """Whether the pixels come back."""
    return np.array_equal(decode_image(encode(pixels)), pixels)


def measure(encoders: dict[str, Encode], pixels: Pixels, folder: Path) -> dict[str, dict]:
    """Median CPU milliseconds of encoding to a file, and the file's bytes."""
    times: dict[str, list[float]] = {name: [] for name in encoders}
    sizes = {}
    for _ in range(ROUNDS):
        for name, encode in encoders.items():
            file = folder / "image.png"
            started = time.process_time()
            file.write_bytes(encode(pixels))
            times[name].append(time.process_time() - started)
            sizes[name] = file.stat().st_size
    return {
        name: {"ms": round(1000 * statistics.median(times[name]), 2), "bytes": sizes[name]}
        for name in encoders
    }


def hashing(pixels: Pixels) -> dict[str, float]:
    """Median CPU milliseconds of what identifies a file: the same for every encoder."""
    content = PNGWriter().encode(pixels)
    times: dict[str, list[float]] = {"sha256 of the file": [], "sha256 of the pixels": []}
    for _ in range(ROUNDS):
        for name, function in zip(
            times, (lambda: sha256(content), lambda: pixels_sha256(pixels)), strict=True
        ):
            started = time.process_time()
            function()
            times[name].append(time.process_time() - started)
    return {name: round(1000 * statistics.median(found), 2) for name, found in times.items()}


def show(title: str, rows: dict[str, dict], equal: dict[str, bool]) -> None:
    """Print a table; the ratio is how much more CPU time than ours."""
    ours = rows.get(OURS, rows.get("png_level 1"))
    assert ours is not None
    print(f"{title:<38} {'CPU ms':>8} {'times':>6} {'kB':>8} {'size':>6}  pixels")
    for name, row in rows.items():
        print(
            f"  {name:<36} {row['ms']:>8.1f} {row['ms'] / ours['ms']:>6.1f} "
            f"{row['bytes'] / 1000:>8.1f} {row['bytes'] / ours['bytes']:>6.2f}  "
            f"{'equal' if equal[name] else 'DIFFER'}"
        )


if __name__ == "__main__":
    sys.exit(main())
