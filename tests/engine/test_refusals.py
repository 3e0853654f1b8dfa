"""What the engine does not own is refused before any record is read, by name and with the way out."""

import warnings

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from client.engine import make_engine, self_test
from client.engine.layout import Layout
from common.errors import InvalidInput


def engine_of(model, task="causal-lm", **settings):
    return make_engine(model, **({"task": task, "pad_token_id": 0, "max_length": 12} | settings))


class Wrapped(nn.Module):
    """A layer with something in front of it."""

    def __init__(self, layer, before):
        super().__init__()
        self.layer, self.before = layer, before

    def forward(self, x, *args, **kwargs):
        return self.layer(self.before(x), *args, **kwargs)


def with_layer_in_front(build, before, family="llama"):
    model = build(family, "all", dtype=torch.float32)
    block = model.get_base_model().model.layers[0]
    block.mlp = Wrapped(block.mlp, before)
    return model


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"use_dora": True}, r"q_proj.*Dora.*use_dora=False"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"embed_tokens.*embedding"),
        ({"modules_to_save": ["norm"]}, r"norm.*LlamaRMSNorm.*freeze"),
        ({"modules_to_save": ["embed_tokens"]}, r"embed_tokens.*Embedding.*freeze"),
        ({"trainable_token_indices": [1, 2]}, r"token_adapter|embed_tokens"),
    ],
    ids=["dora", "embedding", "norm", "saved-embedding", "token-rows"],
)
def test_unowned_trainables_are_named(build, lora, said):
    model = build("llama", **({"target_modules": ["q_proj"]} | lora))
    with pytest.raises(InvalidInput, match=said):
        engine_of(model)


def test_a_trainable_layer_norm_is_named(build):
    model = build("bert")
    norm = model.get_base_model().bert.encoder.layer[1].output.LayerNorm
    norm.weight.requires_grad_(True)
    with pytest.raises(InvalidInput, match=r"encoder\.layer\.1\.output\.LayerNorm\.weight"):
        engine_of(model, "classification")


def test_a_trainable_base_weight_under_lora_is_named(build):
    model = build("llama")
    model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.requires_grad_(True)
    with pytest.raises(InvalidInput, match=r"q_proj.base_layer.weight"):
        engine_of(model)


def test_lora_on_a_convolution_is_refused(build):
    model = build("llama", dtype=torch.float32)
    from peft import LoraConfig, get_peft_model

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = get_peft_model(Net(), LoraConfig(r=2, target_modules=["conv"]))
    model.get_base_model().extra = net.base_model.model
    with pytest.raises(InvalidInput, match=r"extra\.conv.*Conv2d"):
        engine_of(model)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.SyncBatchNorm])
def test_batch_norm_is_named(build, norm):
    model = build("llama", dtype=torch.float32)
    model.get_base_model().model.layers[1].coupled = norm(16)
    with pytest.raises(InvalidInput, match=r"layers\.1\.coupled.*BatchNorm.*LayerNorm"):
        engine_of(model)


def test_experts_with_a_capacity_are_named(build):
    model = build("llama")
    model.get_base_model().model.layers[0].expert_capacity = 4
    with pytest.raises(InvalidInput, match=r"layers\.0.*expert_capacity"):
        engine_of(model)


def test_eight_bit_bases_are_refused(build):
    class Linear8bitLt(nn.Linear):
        pass

    model = build("llama", dtype=torch.float32)
    model.get_base_model().model.layers[0].self_attn.k_proj = Linear8bitLt(16, 8)
    with pytest.raises(InvalidInput, match=r"k_proj.*LLM\.int8.*4 bits"):
        engine_of(model)


def test_dynamic_scales_are_refused_by_name(build):
    class Float8Linear(nn.Linear):
        pass

    model = build("llama", dtype=torch.float32)
    model.get_base_model().model.layers[1].mlp.up_proj = Float8Linear(16, 24)
    with pytest.raises(InvalidInput, match=r"layers\.1\.mlp\.up_proj: Float8Linear.*weight-only"):
        engine_of(model)


def test_mixed_trainable_dtypes_are_named(build):
    model = build("llama", dtype=torch.float32)
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.data = parameter.data.to(torch.bfloat16)
    with pytest.raises(InvalidInput, match=r"share one floating dtype.*bfloat16"):
        engine_of(model)


def test_several_devices_are_refused(build):
    model = build("llama", dtype=torch.float32)
    model.get_base_model().extra = nn.Linear(2, 2, device="meta").requires_grad_(False)
    with pytest.raises(InvalidInput, match=r"several devices.*meta"):
        Layout(model)


def test_nothing_trainable_is_refused(build):
    with pytest.raises(InvalidInput, match="no trainable parameter"):
        engine_of(build("llama").requires_grad_(False))


def test_merged_and_disabled_adapters_are_refused(build):
    model = build("llama")
    model.merge_adapter()
    with pytest.raises(InvalidInput, match="unmerged"):
        engine_of(model)


def test_two_active_adapters_are_refused(build):
    model = build("llama")
    from peft import LoraConfig

    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(InvalidInput, match="exactly one active"):
        engine_of(model)


def test_a_parameter_held_by_another_layer_too_is_named(build):
    model = build("llama", ["q_proj"], modules_to_save=["lm_head"])
    base = model.get_base_model()
    base.model.embed_tokens.weight = base.lm_head.modules_to_save["default"].weight
    with pytest.raises(InvalidInput, match=r"tied"):
        engine_of(model)


def test_an_encoder_is_no_causal_language_model(build):
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    model = build("bert", ["query"], model=BertLMHeadModel(config), task_type=None)
    with pytest.raises(InvalidInput, match="looks ahead"):
        engine_of(model)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"task": "regression"}, "task must be one of"),
        ({"kind": "ghost"}, "fused or opacus"),
        ({"precision": "int8"}, "precision must be one of"),
        ({"max_length": 0}, "max_length"),
        ({"micro_batch_size": 0}, "micro_batch_size"),
        ({"pad_token_id": 61}, "pad_token_id"),
        ({"vocabulary_chunk": 0}, "vocabulary_chunk"),
        ({"task": "classification", "vocabulary_chunk": 8}, "vocabulary_chunk|at least 2"),
        ({"kind": "opacus", "dropout": True}, "dropout"),
    ],
)
def test_settings_out_of_range_are_refused(build, settings, said):
    with pytest.raises(InvalidInput, match=said):
        engine_of(build("llama"), **settings)


def test_a_classifier_with_another_padding_token_is_refused(build):
    with pytest.raises(InvalidInput, match=r"padding token is 0.*is 5"):
        engine_of(build("bert"), "classification", pad_token_id=5)


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan"), float("inf")])
def test_a_clipping_norm_out_of_range_is_refused(build, norm):
    with pytest.raises(InvalidInput, match="clipping_norm"):
        engine_of(build("llama")).clipped_sum([], norm)


# What only running shows: the self-test, on made-up public tokens.


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_set_after_the_adapter_passes(build, reentrant):
    model = build("llama", "all", dtype=torch.float32)
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": reentrant})
    self_test(engine_of(model))


def test_a_layer_that_is_never_reached_is_named(build):
    model = build("llama", "all", dtype=torch.float32)
    mlp = model.get_base_model().model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.up_proj(x))
    with pytest.raises(InvalidInput, match=r"layers\.1\.mlp\.gate_proj\.lora_A.*does not change"):
        self_test(engine_of(model))


def test_an_adapter_cut_off_from_the_loss_is_named(build):
    model = with_layer_in_front(build, lambda x: x.detach())
    attention = model.get_base_model().model.layers[1].self_attn
    plain = attention.v_proj.forward
    attention.v_proj.forward = lambda x: plain(x).detach()
    engine = engine_of(model)
    engine.source.sites = [site for site in engine.source.sites if site.module is not attention.v_proj]
    with pytest.raises(InvalidInput, match=r"v_proj\.lora_A.*does not change"):
        self_test(engine)


def test_batch_statistics_are_found_by_running(build):
    class Centre(nn.Module):
        def forward(self, x):
            return x - x.mean(0, keepdim=True)

    with pytest.raises(InvalidInput, match="changes with its neighbours"):
        self_test(engine_of(with_layer_in_front(build, Centre())))


def test_a_shared_scale_is_found_by_running(build):
    class DynamicScale(nn.Module):
        def forward(self, x):
            return x / x.abs().amax()

    with pytest.raises(InvalidInput, match="changes with its neighbours"):
        self_test(engine_of(with_layer_in_front(build, DynamicScale())))


def test_randomness_of_the_model_s_own_is_found_by_running(build):
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    with pytest.raises(InvalidInput, match="two identical runs differ"):
        self_test(engine_of(with_layer_in_front(build, Noise())))


def test_time_first_layouts_are_refused_by_name(build):
    class TimeFirst(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.mlp = mlp

        def forward(self, x):
            return self.mlp(x.transpose(0, 1)).transpose(0, 1)

    model = build("llama", "all", dtype=torch.float32)
    block = model.get_base_model().model.layers[0]
    block.mlp = TimeFirst(block.mlp)
    with pytest.raises(InvalidInput, match=r"layers\.0\.mlp\.mlp\.\w+_proj: unknown layout"):
        self_test(engine_of(model))


def test_a_wrong_kernel_is_found_by_running(build, monkeypatch):
    engine = engine_of(build("llama", dtype=torch.float32))
    engine.source.sites[0].scaling *= 1.1
    with pytest.raises(InvalidInput, match="do not add up"):
        self_test(engine)


def test_a_record_of_maximum_length_that_does_not_fit_is_said_before_data(build, monkeypatch):
    engine = engine_of(build("llama", dtype=torch.float32))

    def out_of_memory(batch, loss):
        raise torch.OutOfMemoryError("made up")

    before = engine.read()
    monkeypatch.setattr(engine.source, "rows", out_of_memory)
    with pytest.raises(InvalidInput, match=r"one example of maximum length \(1 x 12.*lower max_length"):
        self_test(engine)
    assert all((engine.read()[name] == before[name]).all() for name in before)


def test_reading_past_the_context_is_said_before_data(build):
    model = build("gpt2", dtype=torch.float32)
    with pytest.raises(InvalidInput, match="maximum length"):
        self_test(engine_of(model, max_length=64))


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "nan"])
def test_an_adapter_of_another_shape_is_refused_and_changes_nothing(build, change):
    engine = engine_of(build("llama", dtype=torch.float32))
    arrays, before = engine.read(), engine.read()
    name = next(iter(arrays))
    if change == "missing":
        del arrays[name]
    elif change == "unknown":
        arrays["other"] = arrays[name]
    elif change == "shape":
        arrays[name] = arrays[name][:1]
    else:
        arrays[name] = arrays[name] * float("nan")
    with pytest.raises(InvalidInput, match=r"other|lora_A"):
        engine.load(arrays)
    assert all((engine.read()[key] == before[key]).all() for key in before)


def test_llama_experts_without_capacity_are_owned(build):
    # routing looks at one token at a time: nothing couples records, so nothing is refused
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=1, pad_token_id=0, max_position_embeddings=40,
    )  # fmt: skip
    model = build("mixtral", model=MixtralForCausalLM(config), dtype=torch.float32)
    self_test(engine_of(model))
    assert LlamaConfig().model_type == LlamaForCausalLM.config_class.model_type
