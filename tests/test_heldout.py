import numpy as np
import pytest
import torch
from fakes import make_trace
from students import make_model

from student_train.model.forward import StudentWithLoss
from student_train.model.heldout import heldout_figures
from student_train.model.load import head_of

CPU = torch.device("cpu")


def dense_figures(model, traces, first, end):
    """KL over kept entries and one bucket, and NLL, written out in float64, token by token."""
    kl, nll = [], []
    for trace in traces:
        with torch.no_grad():
            ids = torch.from_numpy(trace.token_ids.astype(np.int64))[None]
            student = model.double()(input_ids=ids).logits[0].log_softmax(-1).numpy()
        for t in range(first(trace), end(trace)):
            if trace.k[t]:
                teacher = trace.logprobs(t)
                p = np.exp(teacher.logprobs)
                q = np.exp(student[t - 1][teacher.ids])
                tail_p, tail_q = 1 - p.sum(), 1 - q.sum()
                kl.append((p * np.log(p / q)).sum() + tail_p * np.log(tail_p / tail_q))
                nll.append(-student[t - 1][trace.token_ids[t]])
    return len(kl), np.mean(kl), np.mean(nll)


def test_figures_are_those_of_the_whole_traces_by_section():
    traces = [make_trace(f"t{n}", 24 + 7 * n, seed=n, without_entries=(9,)) for n in range(3)]
    model = make_model(initializer_range=0.5).double().eval()
    student = StudentWithLoss(model, head_of(model))
    found = heldout_figures(student, traces, CPU)

    sections = {
        "prompt": (lambda t: 0, lambda t: t.cot_start),
        "cot": (lambda t: t.cot_start, lambda t: t.answer_start),
        "answer": (lambda t: t.answer_start, lambda t: t.n_total),
        "all": (lambda t: 0, lambda t: t.n_total),
    }
    assert list(found) == list(sections)
    for name, (first, end) in sections.items():
        num_tokens, kl, nll = dense_figures(model, traces, first, end)
        assert found[name].num_tokens == num_tokens
        assert found[name].kl == pytest.approx(kl, rel=1e-4)
        assert found[name].nll == pytest.approx(nll, rel=1e-4)
        assert 0 <= found[name].top1_agreement <= 1


def test_a_section_without_distributions_is_left_out_and_nothing_gives_nothing():
    trace = make_trace("t", 40, without_entries=range(10))
    model = make_model().eval()
    student = StudentWithLoss(model, head_of(model))

    assert list(heldout_figures(student, [trace], CPU)) == ["cot", "answer", "all"]
    assert heldout_figures(student, [], CPU) == {}
