"""The pages of tools/demo, copied, and pictures of them; `PYTHONPATH=.:tests` for the browser."""

import argparse
import shutil
import tempfile
from pathlib import Path

from browsers import chromium, open_page, resize

# Page, element that says it is ready, width in pixels, and whether a dark screen is asked for.
PICTURES = [
    ("view", "body[data-shown]", 1280, False),
    ("view", "body[data-shown]", 390, True),
    ("compare", "body", 1280, False),
    ("compare", "body", 390, True),
]
HEIGHTS = {1280: 760, 390: 844}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder that tools/demo wrote")
    parser.add_argument("kept", type=Path, help="folder for the pages and pictures")
    paths = parser.parse_args()
    for name in ("view.html", "compare.html", "report.txt"):
        shutil.copy(paths.out / name, paths.kept / name)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        chromium(Path(profile)) as browser,
    ):
        for name, ready, width, is_dark in PICTURES:
            resize(browser, width, HEIGHTS[width], dark=is_dark)
            open_page(browser, (paths.kept / f"{name}.html").resolve(), ready)
            if name == "view":
                # At half of the trace, where the teacher is in two minds.
                browser.execute_script(
                    "const span = document.getElementById('span'); span.value = 50;"
                    "span.dispatchEvent(new Event('input'));"
                    "document.getElementById('next-peak').click()"
                )
            (paths.kept / f"{name}-{width}.png").write_bytes(browser.get_screenshot_as_png())


if __name__ == "__main__":
    main()
