"""The first short questions of GSM8K with their solutions, as rows for `cache-teacher score`.

python tools/truncation/gsm8k_rows.py FILE NUM > rows.jsonl
"""

import json
import re
import sys
from pathlib import Path

LONGEST_ROW = 450  # characters of question and solution: half of GSM8K
_CALCULATION = re.compile(r"<<.*?>>")  # marks for a calculator; no language


def main() -> None:
    file, num_left = Path(sys.argv[1]), int(sys.argv[2])
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        solution = _CALCULATION.sub("", row["answer"])
        if num_left and len(row["question"]) + len(solution) <= LONGEST_ROW:
            asked = {"role": "user", "content": row["question"]}
            messages = [asked, {"role": "assistant", "content": solution}]
            print(json.dumps({"id": f"{file.stem}-{number}", "messages": messages}))
            num_left -= 1
    if num_left:
        sys.exit(f"{file}: {num_left} rows of at most {LONGEST_ROW} characters are missing")


if __name__ == "__main__":
    main()
