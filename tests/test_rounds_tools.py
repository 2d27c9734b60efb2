"""Tools of tools/rounds: the guide's tables follow from the data beside them; the live teacher."""

import csv
import importlib.util
from pathlib import Path

import pytest
import torch
from students import make_model

from student_train.evaluation.requests import Request, Tokens
from student_train.objective import Objective

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tools/results/rounds"


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/rounds/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.csv")), ids=lambda file: file.stem)
def test_the_tables_of_the_guide_follow_from_the_answers_beside_them(capsys, file):
    with file.open() as lines:
        tool("table").write_table(list(csv.DictReader(lines)))

    table = capsys.readouterr().out
    assert table.count("\n") > 4
    assert table in (ROOT / "student_train/rounds/README.md").read_text()


def test_a_live_teacher_s_loss_is_the_reverse_kl_of_what_was_written():
    live, student, teacher = tool("live"), make_model(seed=1), make_model(seed=2)
    batch = [
        (Request((3, 4, 5), 4), Tokens((6, 7), finished=True)),
        (Request((8,), 4), Tokens((9, 10, 11, 2), finished=True)),
    ]
    ids_BT, index_N = live._rows(batch)
    loss = live._loss(student, teacher, ids_BT, index_N, Objective("reverse_kl", ce_weight=0.0))

    with torch.no_grad():
        log_q, log_p = (m(ids_BT).logits.double().log_softmax(-1) for m in (student, teacher))
    kl_BT = (log_q.exp() * (log_q - log_p)).sum(-1)
    expected = torch.stack([*kl_BT[0, 2:4], *kl_BT[1, :4]]).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
