"""Distil a cache with TRL's SFTTrainer: example_sft_trainer.py CACHE STUDENT OUT MAX_STEPS."""

import sys

from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from student_train import (
    DistillationDataset,
    TokenSelection,
    collate_traces,
    open_data,
    sparse_kl,
)


class DistillationTrainer(SFTTrainer):
    """The sparse KL instead of the cross entropy; everything else is TRL's own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = inputs["batch"].to(self.args.device)
        outputs = model(input_ids=batch.input_ids, output_hidden_states=True, logits_to_keep=1)
        hidden = outputs.hidden_states[-1].flatten(0, 1)[batch.hidden_index]
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        result = sparse_kl(hidden, head.weight, batch.targets, batch.token_weight)
        loss = result.loss * self.accelerator.num_processes / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


if __name__ == "__main__":
    cache, student, out, max_steps = sys.argv[1:]
    traces = DistillationDataset(
        open_data([cache]), TokenSelection(lead_span=0.5), batch_traces=1, num_epochs=3
    ).as_hf_dataset()
    arguments = SFTConfig(
        out, max_steps=int(max_steps), per_device_train_batch_size=4, logging_steps=1,
        max_length=None, bf16=False, dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,  # the teacher's
        accelerator_config={"dispatch_batches": False},  # each process collates its own
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(student)
    DistillationTrainer(
        model=model, args=arguments, train_dataset=traces, data_collator=collate_traces
    ).train()
