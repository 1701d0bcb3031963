"""A picture of a conversation in a true terminal: python bench/screenshot.py CHECKPOINT assets/chat.png LINE [LINE …].

chat.py runs in a pseudo-terminal (pexpect), a terminal emulator (pyte) takes what it writes, and Pillow draws that screen.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

import pexpect
import pyte
from PIL import Image, ImageDraw, ImageFont

SIZE, COLUMNS, LINES = 22, 80, 15
BACKGROUND, COLORS = "#1d2026", {"default": "#d8dade", "green": "#8ccf7e", "brown": "#e5c76b", "red": "#e57474"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("png")
    parser.add_argument("line", nargs="+", help="what is typed; an argument of the form key=value is a setting")
    parser.add_argument("--font", help="a monospaced font with wide characters; otherwise what fontconfig finds for Chinese")
    options = parser.parse_args()
    settings = [line for line in options.line if "=" in line.split()[0]]
    screen = converse(options.checkpoint, settings, [line for line in options.line if line not in settings])
    draw(screen, options.font or find_font()).save(options.png, optimize=True)


def converse(path, settings, lines):
    """The screen after `lines` were typed and answered."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.Stream(screen)
    with tempfile.TemporaryDirectory() as folder:
        child = pexpect.spawn(sys.executable, ["chat.py", path, f"history_path={folder}/history", *settings], encoding="utf-8",
                              dimensions=(LINES, COLUMNS), env=os.environ | {"TERM": "xterm-256color"})
        screen.write_process_input = child.send
        for line in [*lines, None]:
            seen, quiet = "", 0
            while "\x1b[?2004h" not in seen or quiet < 5:  # a prompt, and then half a second of silence
                try:
                    text = child.read_nonblocking(65536, timeout=0.1)
                    seen, quiet = seen + text, 0
                    stream.feed(text)
                except pexpect.TIMEOUT:
                    quiet += 1
            if line:
                child.send(line)
                time.sleep(0.3)
                child.send("\r")
        child.close(force=True)
    return screen


def find_font():
    try:
        command = ["fc-match", "-f", "%{file}", "Noto Sans Mono CJK SC:lang=zh-cn"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise SystemExit("no font found; name one: --font FILE")


def draw(screen, path):
    """The screen as an image, each character in its cell; a wide one has two."""
    number = 0
    if path.endswith(".ttc"):  # the collection's monospaced simplified Chinese, if it has one
        names = [ImageFont.truetype(path, SIZE, index=n).getname()[0] for n in range(10)]
        number = next((n for n, name in enumerate(names) if "Mono CJK SC" in name), 0)
    font = ImageFont.truetype(path, SIZE, index=number)
    width, height = SIZE / 2, round(SIZE * 1.45)
    used = [y for y in range(LINES) if screen.display[y].strip()]
    image = Image.new("RGB", (round(width * COLUMNS) + 2 * SIZE, height * (used[-1] + 1) + 2 * SIZE), BACKGROUND)
    pen = ImageDraw.Draw(image)
    for y in range(used[-1] + 1):
        for x in range(COLUMNS):
            cell = screen.buffer[y][x]
            left, top = SIZE + x * width, SIZE + y * height
            color = COLORS.get(cell.fg, f"#{cell.fg}" if len(cell.fg) == 6 else COLORS["default"])
            back = COLORS.get(cell.bg, BACKGROUND) if cell.bg != "default" else BACKGROUND
            if cell.reverse:
                color, back = back, "#7a808a"
            if back != BACKGROUND:
                pen.rectangle([left, top, left + width, top + height - 1], fill=back)
            if cell.data.strip():
                pen.text((left, top + height / 2), cell.data, font=font, fill=color, anchor="lm")
    return image


if __name__ == "__main__":
    main()
