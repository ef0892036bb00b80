"""Aligners in peft, in Lightning, in the Trainer of transformers, and in several processes."""

import json
import os

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import repa
from repa.base.errors import UserError
from tests.alignment.networks import CASES


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


def start():
    torch.manual_seed(0)
    net = Net()
    return net, repa.attach(net, "blocks.0", 5, loss="cosine", hidden_dim=8, schedule="linear:steps=10")


def batches(num=6):
    stream = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 9, 8, generator=stream), torch.randn(4, 9, 5, generator=stream)) for _ in range(num)]


def losses_of_a_plain_loop(num=6):
    net, aligner = start()
    optimizer, losses = torch.optim.SGD([*net.parameters(), *aligner.parameters()], lr=0.1), []
    for x, features in batches(num):
        loss = net(x).square().mean() + aligner(features)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        aligner.step()
        losses.append(loss.item())
    return losses


def test_lightning_has_the_same_losses_as_a_plain_loop(tmp_path):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.aligner = start()
            self.losses = []

        def training_step(self, batch, number):
            x, features = batch
            loss = self.net(x).square().mean() + self.aligner(features)
            self.losses.append(loss.item())
            return loss

        def on_train_batch_end(self, *args):
            self.aligner.step()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    x, features = (torch.cat(part) for part in zip(*batches(), strict=True))
    module = Module()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(x, features), batch_size=4))
    assert module.losses == pytest.approx(losses_of_a_plain_loop(), rel=1e-6)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    restored = Module()
    restored.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    assert restored.aligner.steps == 6


def test_the_transformers_trainer_has_the_same_losses_as_a_plain_loop(tmp_path):
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Aligned(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.aligner = start()
            self.losses = []

        def forward(self, x, features):
            loss = self.net(x).square().mean() + self.aligner(features)
            self.losses.append(loss.item())
            return {"loss": loss}

    class Step(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.aligner.step()

    rows = [{"x": x, "features": f} for batch in batches() for x, f in zip(*batch, strict=True)]
    model = Aligned()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=6, learning_rate=0.1, lr_scheduler_type="constant",
        optim="sgd", max_grad_norm=0, save_steps=6, report_to=[], use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False,
    )  # fmt: skip

    class InOrder(Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(rows)

    InOrder(model, arguments, train_dataset=rows, callbacks=[Step()]).train()
    assert model.losses == pytest.approx(losses_of_a_plain_loop(), rel=1e-6)
    state = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert json.loads(bytes(state["aligner._extra_state"].tolist()))["steps"] == 6


def lora_case():
    torch.manual_seed(0)
    case = CASES["dit"]()
    case.net.eval()  # drops no labels
    return case


def test_peft_lora_works_before_and_after_attaching():
    from peft import LoraConfig, get_peft_model

    features = torch.randn(2, 16, 7)
    found = []
    for attach_first in (True, False):
        case = lora_case()
        if attach_first:
            aligner = repa.attach(case.net, case.block)
        model = get_peft_model(case.net, LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
        if not attach_first:
            aligner = repa.attach(model, case.block)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora" in name:
                nn.init.normal_(parameter, std=0.1)
        inputs = torch.randn(2, 4, 8, 8)
        model(inputs, timestep=torch.tensor([1, 2]), class_labels=torch.tensor([1, 2]))
        loss = aligner.loss(features)
        loss.backward()
        found.append(loss.item())
        trained = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]
        assert trained
        assert all("lora" in name and "transformer_blocks.2" not in name for name in trained)  # after the tap
    assert found[0] == found[1]


def test_projectors_in_modules_to_save_are_saved_and_loaded_by_peft(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    def aligned():
        torch.manual_seed(0)
        net = Net()
        net.aligner = repa.attach(net, "blocks.0", 5, loss="cosine", hidden_dim=8)
        return net

    config = LoraConfig(r=2, target_modules=["out", "blocks.0.0"], modules_to_save=["aligner"])
    model = get_peft_model(aligned(), config)
    (x, features), *_ = batches(1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        (model(x).square().mean() + model.base_model.model.aligner(features)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model(x)
    expected = model.base_model.model.aligner(features)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(aligned(), tmp_path)
    again(x)
    again.requires_grad_(True)
    again(x)
    assert torch.equal(again.base_model.model.aligner(features), expected)


def _two(rank, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    net, aligner = start()
    both = nn.parallel.DistributedDataParallel(net), nn.parallel.DistributedDataParallel(aligner)
    losses = []
    optimizer = torch.optim.SGD([*net.parameters(), *aligner.parameters()], lr=0.1)
    for x, features in batches(3):
        part = slice(2 * rank, 2 * rank + 2)
        loss = both[0](x[part]).square().mean() + both[1](features[part])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        aligner.step()
        losses.append(loss.detach())
    with pytest.raises(UserError, match="several processes"):  # gradients of its projectors would not be averaged
        aligner.loss(features)
    mean = torch.stack(losses)
    torch.distributed.all_reduce(mean)
    if rank == 0:
        torch.save(mean / 2, f"{folder}/losses.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_same_losses_as_one(tmp_path):
    mp.spawn(_two, (str(tmp_path),), nprocs=2)
    assert torch.load(tmp_path / "losses.pt").tolist() == pytest.approx(losses_of_a_plain_loop(3), rel=1e-5)
