"""Two processes with gloo: DDP under TRL's trainers, and FSDP2 around the model with TRL's hook."""

from processes import run_on_two

DDP = """
import sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import peft
from trl_runs import build, run, same
from align_engine.integrations.trl import fuse

folder, out = map(Path, sys.argv[1:])
lora = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM",
                       ensure_weight_tying=False)
for kind, settings in (("dpo", {}), ("grpo", {}), ("async_grpo", {}), ("sft", dict(gradient_accumulation_steps=2))):
    settings = dict(max_steps=4, per_device_train_batch_size=2) | settings
    theirs = run(build(kind, folder, out, **settings))
    trainer = fuse(build(kind, folder, out, **settings))
    assert trainer.accelerator.num_processes == 2
    same(run(trainer), theirs)
with fuse():  # each rank has its own rows: were the gradients not averaged, the adapters would part
    logs, weights = run(build("sft", folder, out, max_steps=4, per_device_train_batch_size=2, peft_config=lora))
import torch, torch.distributed as dist
for name, weight in weights.items():
    other = weight.clone()
    dist.broadcast(other, 0)
    assert torch.equal(other, weight), name
"""
FSDP = """
import sys, warnings
warnings.simplefilter("ignore")
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM
from trl.trainer import utils
from align_engine.integrations.trl import add_fused_lm_head

dist.init_process_group("gloo")
mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
ids = torch.randint(0, 67, (2, 3, 9), generator=torch.Generator().manual_seed(1))
labels = ids.masked_fill(torch.arange(9) < torch.tensor([[[2], [4], [1]], [[5], [3], [6]]]), -100)

def loss(model, i):
    out = model(input_ids=ids[i], labels=labels[i], fused_lm_head=True)
    return out.loss + 0.1 * out.entropy.mean()

for parts in ((), ("layers",), ("layers", "head")):
    load = lambda: LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, tie_word_embeddings=False)
    torch.manual_seed(0)
    whole, model = load(), load()
    model.load_state_dict(whole.state_dict())
    utils.add_fused_lm_head(whole, outputs=("log_probs", "entropy"))
    add_fused_lm_head(model)
    for layer in model.model.layers if "layers" in parts else ():
        fully_shard(layer, mesh=mesh)
    if "head" in parts:
        fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss(model, rank).backward()
    ((loss(whole, 0) + loss(whole, 1)) / 2).backward()
    for (name, p), q in zip(model.named_parameters(), whole.parameters()):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, atol=1e-5, rtol=1e-4, msg=f"{parts} {name}")
"""


def test_ddp(trl_model, tmp_path):
    run_on_two(DDP, trl_model, tmp_path)


def test_fsdp2(trl_model):
    run_on_two(FSDP, trl_model)
