"""Distil a cache with transformers' own Trainer: example_trainer.py CACHE STUDENT OUT [resume]."""

import sys

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from student_train import DistillationDataset, TokenSelection, open_data, sparse_kl


class DistillationTrainer(Trainer):
    """The stream instead of a sampler, the sparse KL instead of the model's own loss."""

    def get_train_dataloader(self):
        return self.train_dataset.loader()  # which has this process's part already

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = inputs["batch"].to(self.args.device)
        outputs = model(input_ids=batch.input_ids, output_hidden_states=True, logits_to_keep=1)
        hidden = outputs.hidden_states[-1].flatten(0, 1)[batch.hidden_index]
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        result = sparse_kl(hidden, head.weight, batch.targets, batch.token_weight)
        # One sum over all processes, whose gradients are averaged; items are loss tokens.
        loss = result.loss * self.accelerator.num_processes / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


if __name__ == "__main__":
    cache, student, out, *resume = sys.argv[1:]
    dataset = DistillationDataset(open_data([cache]), TokenSelection(lead_span=0.5), batch_traces=4)
    arguments = TrainingArguments(out, num_train_epochs=3, save_steps=5, logging_steps=1)
    model = AutoModelForCausalLM.from_pretrained(student)
    trainer = DistillationTrainer(model=model, args=arguments, train_dataset=dataset)
    trainer.train(resume_from_checkpoint=bool(resume))
    trainer.save_model(out)
