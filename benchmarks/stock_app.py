"""A stock Flower 1.41 app of the same model, as its users write one: what ``benchmarks/overhead.py`` compares with.

FedAvg by ``strategy.start``; the ClientApp loads transformers, peft, the backbone and the records for every message,
because Flower 1.41 starts a process for every message. It trains the same LoRA shapes on the same records with
the same number of records per step, without privacy, and says how long the training alone took.
"""

PYPROJECT = """
[project]
name = "stock"
version = "1.0.0"
description = "FedAvg of LoRA adapters"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "stock"

[tool.flwr.app.components]
serverapp = "stock.server:app"
clientapp = "stock.client:app"

[tool.flwr.app.config]
rounds = 3
backbone = ""
records = ""
"""
MODEL = """
import json, time

import torch
from peft import LoraConfig, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)

def load(folder):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    adapter = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"}
    return get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM, **adapter))

def state(model):
    return {name: tensor.float() for name, tensor in get_peft_model_state_dict(model).items()}

def batches(folder, path, steps, size):
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = [json.loads(line) for line in open(path)]
    for step in range(steps):
        chosen = [rows[(step * size + i) % len(rows)] for i in range(size)]
        texts = [f"{row['prompt']} {row['completion']}" for row in chosen]
        yield tokenizer(texts, truncation=True, max_length=64, padding=True, return_tensors="pt")

def train(model, data):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    started = time.perf_counter()
    for batch in data:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - started
"""
CLIENT = """
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from stock.model import batches, load, set_peft_model_state_dict, state, train

app = ClientApp()

@app.train()
def train_once(message, context):
    folder, path = str(context.run_config["backbone"]), str(context.run_config["records"])
    model = load(folder)
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    seconds = train(model, list(batches(folder, path, 1, 8)))
    content = RecordDict({
        "arrays": ArrayRecord(state(model)),
        "metrics": MetricRecord({"num-examples": 8, "train-seconds": seconds}),
    })
    return Message(content, reply_to=message)
"""
SERVER = """
import json, time

from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

from stock.model import load, state

app = ServerApp()

class Timed(FedAvg):
    def configure_train(self, server_round, arrays, config, grid):
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self.sent = time.perf_counter()
        return messages

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        found = super().aggregate_train(server_round, replies)
        seconds = [reply.content["metrics"]["train-seconds"] for reply in replies if not reply.has_error()]
        line = {"round": server_round, "seconds": time.perf_counter() - self.sent, "training": seconds}
        print("STOCK", json.dumps(line), flush=True)
        return found

@app.main()
def main(grid, context):
    initial = ArrayRecord(state(load(str(context.run_config["backbone"]))))
    strategy = Timed(fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2)
    strategy.start(grid=grid, initial_arrays=initial, num_rounds=int(context.run_config["rounds"]), timeout=300)
"""

FILES = {
    "pyproject.toml": PYPROJECT.encode(),
    "README.md": b"A stock Flower app.\n",
    "stock/__init__.py": b"",
    "stock/model.py": MODEL.encode(),
    "stock/client.py": CLIENT.encode(),
    "stock/server.py": SERVER.encode(),
}
