import pytest
from students import make_model, make_tokenizer

from student_train.model.load import head_of, student_fingerprint


def test_a_head_that_is_more_than_the_config_says_is_refused():
    class Doubled(type(make_model())):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.01
            return output

    model = Doubled(make_model().config)

    with pytest.raises(ValueError, match=r"logit_scale=1.0 and softcap=None .*not supported"):
        head_of(model)


def test_a_model_without_a_linear_head_is_refused():
    with pytest.raises(ValueError, match="expected a body and a linear head"):
        head_of(make_model().model)


def test_the_probe_leaves_the_mode_as_it_was():
    model = make_model().train()
    head_of(model)

    assert model.training


def test_a_students_fingerprint_is_that_of_its_weights():
    same = [student_fingerprint(make_model()) for _ in range(2)]

    assert same[0] == same[1]
    assert same[0] != student_fingerprint(make_model(seed=1))


def test_the_fake_tokenizer_reads_what_it_writes():
    tokenizer = make_tokenizer()

    assert tokenizer("<think> 5 </think>")["input_ids"] == [1, 8, 2]
