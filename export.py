"""A checkpoint for other programs: a folder for Hugging Face's transformers, and back, or a GGUF file for llama.cpp.

    python export.py checkpoints/demo/last.pth exported
    python export.py exported checkpoints/back.pth
    python export.py checkpoints/demo/last.pth demo.gguf

`modern` becomes Qwen3ForCausalLM, `gpt2` GPT2LMHeadModel; their logits are the same up to rounding (GGUF: to float16).
"""

import argparse
import json
import os
import pathlib
import sys

import torch

import checkpoint
import settings as settings_module
from data import UNSPOKEN
from model import GPT, GPTConfig, rms_norm
from settings import ChatSettings, UserError, quoted
from tokenizer import PAD, SEP, SPECIALS, UNK, BPETokenizer, CharTokenizer

QWEN3 = {  # our names in a block: Qwen3's
    "norm1": "input_layernorm", "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj", "attention.v": "self_attn.v_proj",
    "attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm", "attention.out": "self_attn.o_proj",
    "norm2": "post_attention_layernorm", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.out": "mlp.down_proj"}
# An utterance a line, the line end is <sep>; what is to be answered is closed by one too.
CHAT_TEMPLATE = ("{% for message in messages %}{% set text = message['content'] %}"  # llama.cpp looks whether a system's text is read
                 f"{{% if text and text.strip() and message['role'] not in {sorted(UNSPOKEN)} %}}"
                 "{{ text.replace('\\r\\n', '\\n').strip().replace('\\n', ' ') + '\\n' }}{% endif %}{% endfor %}")


@torch.no_grad()
def export(path, target):
    """Writes the GPT of the checkpoint `path` (a classifier's too, without its head) to `target`, a new folder or .gguf file, or that
    of the folder `path` to a new checkpoint."""
    target = os.path.normpath(target)
    ending = os.path.splitext(target)[1].lower()
    if os.path.isdir(path):
        read, write, reader = read_folder, write_checkpoint, f"python chat.py {quoted(target)}"
    elif ending == ".gguf":
        read, write, reader = checkpoint.load_model, write_gguf, f"llama.cpp: llama-server -m {quoted(target)}"
    else:
        read, write, reader = checkpoint.load_model, write_folder, "transformers' AutoModelForCausalLM and AutoTokenizer"
    if write is write_checkpoint and ending != ".pth":
        raise UserError(f"{path} is a folder: of Hugging Face's files name a new file NAME.pth, not {target}; of checkpoints, one of them")
    if write is write_folder and ending in (".onnx", ".safetensors", ".bin", ".pt", ".pth") and os.path.exists(path):
        raise UserError(f"{target} would be a folder: name one without that ending, or a file NAME.gguf")
    if os.path.lexists(target):
        raise UserError(f"{target} exists; name a new one")
    try:
        model, tokenizer, *meta = read(path)
        write(target, model, tokenizer)
    except ImportError as error:
        raise UserError(f"{target} needs {error.name}: python -m pip install {error.name}")
    headless = any("classifier" in one for one in meta)
    print(f"{target}{' (without the head of the classifier)' * headless}: load it with {reader}")


def write_checkpoint(path, model, tokenizer):
    checkpoint.write(path, checkpoint.describe(model, tokenizer) | dict(optimizer=None, scaler=None, progress={}, settings={}, metrics={}))


def read_folder(folder):
    """(model, tokenizer) of a folder that `write_folder` made, whatever transformers has made of the weights since."""
    import safetensors.torch
    read = lambda name: json.loads(pathlib.Path(folder, name).read_text(encoding="utf-8"))
    try:
        tokenizer, theirs = tokenizer_from(read("tokenizer.json")), read("config.json")
        weights = safetensors.torch.load_file(os.path.join(folder, "model.safetensors"))
        if modern := theirs["model_type"] == "qwen3":
            names = dict(block_size="max_position_embeddings", n_layer="num_hidden_layers", n_head="num_attention_heads",
                         n_kv_head="num_key_value_heads", n_embd="hidden_size")
        else:
            names = dict(block_size="n_positions", n_layer="n_layer", n_head="n_head", n_embd="n_embd")
        shape = {ours: theirs[name] for ours, name in names.items()} | dict(tied=not modern and theirs.get("tie_word_embeddings", True))
        model = GPT(GPTConfig(tokenizer.size, arch="modern" if modern else "gpt2", **shape))
        places, wanted = (qwen3 if modern else gpt2)(model, tokenizer.size)
        for key, value in (wanted | dict(vocab_size=tokenizer.size)).items():
            if theirs.get(key, value) != value:
                raise ValueError(f"{key} is {theirs[key]}, not {value}")
        for name, place in places.items():  # parameters, or views of them, but for what was made of several
            place.copy_(weights[name])
        if modern:
            model.embedding.weight[:tokenizer.size] = rows = weights["model.embed_tokens.weight"].float()
            sizes = rows.square().mean(dim=1).sqrt()
            for block in model.blocks:  # look-ups are normalised to size 1: what blocks add to them keeps its proportion
                block.attention.out.weight /= sizes.mean()
                block.mlp.out.weight /= sizes.mean()
            if (spread := (sizes.max() / sizes.min() - 1).item()) > 0.02:
                print(f"{folder}: rows of the embedding have come to differ in size by up to {spread:.0%}, which a checkpoint does not "
                      "keep: replies may change a little", file=sys.stderr)
        else:
            for layer, block in enumerate(model.blocks):
                for kind in ("weight", "bias"):
                    parts = weights[f"transformer.h.{layer}.attn.c_attn.{kind}"].chunk(3, dim=-1)
                    for linear, part in zip((block.attention.q, block.attention.k, block.attention.v), parts):
                        getattr(linear, kind).copy_(part.t())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError,
            safetensors.SafetensorError) as error:
        raise UserError(f"{folder} is no folder that export.py wrote, or not whole (LoRA adapters must be merged first): "
                        f"{type(error).__name__}: {error}")
    return model, tokenizer


def write_folder(path, model, tokenizer):
    """Hugging Face's files: the configuration, matrices in float32, the tokenizer."""
    import safetensors.torch
    weights, config = (qwen3 if model.config.modern else gpt2)(model, tokenizer.size)
    ends = dict(eos_token_id=[SEP, PAD], pad_token_id=PAD, bos_token_id=None)
    files = dict(
        config=config | ends | dict(vocab_size=tokenizer.size, dtype="float32"),
        generation_config=ends | dict(
            do_sample=True, temperature=ChatSettings.temperature, top_p=ChatSettings.top_p, top_k=0, suppress_tokens=[UNK],
            min_new_tokens=1, max_new_tokens=min(ChatSettings.max_new_tokens, model.config.block_size // 2)),
        tokenizer_config=dict(
            tokenizer_class="PreTrainedTokenizerFast", unk_token=SPECIALS[UNK], pad_token=SPECIALS[PAD], eos_token=SPECIALS[PAD],
            padding_side="left", split_special_tokens=True, model_max_length=model.config.block_size, chat_template=CHAT_TEMPLATE,
            model_input_names=["input_ids", "attention_mask"]),  # transformers 4 would add a third
        tokenizer=json.loads(tokenizer_of(tokenizer).to_str()))
    with checkpoint.whole(path) as folder:
        os.makedirs(folder)
        with open(os.path.join(folder, "model.safetensors"), "wb") as file:
            file.write(safetensors.torch.save({name: tensor.contiguous() for name, tensor in weights.items()}, metadata={"format": "pt"}))
        for name, content in files.items():
            pathlib.Path(folder, name + ".json").write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def write_gguf(path, model, tokenizer):
    """llama.cpp's file: matrices in float16, tokenizer, chat template."""
    import gguf
    c = model.config
    weights, _ = (qwen3 if c.modern else gpt2)(model, tokenizer.size)
    arch = gguf.MODEL_ARCH.QWEN3 if c.modern else gguf.MODEL_ARCH.GPT2
    names = gguf.get_tensor_name_map(arch, c.n_layer)
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_block_count(c.n_layer)
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_feed_forward_length(c.hidden_size)
    writer.add_head_count(c.n_head)
    if c.modern:
        writer.add_head_count_kv(c.n_kv_head)
        writer.add_rope_freq_base(10000.0)
        writer.add_layer_norm_rms_eps(1e-6)
    else:
        writer.add_layer_norm_eps(1e-5)
    add_tokenizer(writer, tokenizer, gguf.TokenType)
    writer.add_sampling_temp(ChatSettings.temperature)
    writer.add_sampling_top_p(ChatSettings.top_p)
    writer.add_sampling_top_k(ChatSettings.top_k)
    writer.add_sampling_min_p(ChatSettings.min_p)
    for name, tensor in weights.items():
        if name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")):  # Hugging Face's GPT-2 has them transposed
            tensor = tensor.T
        array = tensor.float().contiguous().numpy().astype("float16" if tensor.dim() == 2 else "float32")
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), array)
    with checkpoint.whole(path) as temporary:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        writer.write_header_to_file(pathlib.Path(temporary))
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def add_tokenizer(writer, ours, kind):
    """Our tokenizer and chat template in llama.cpp's terms."""
    if isinstance(ours, BPETokenizer):
        bpe = json.loads(ours.bpe.to_str())["model"]
        if not bpe["merges"]:
            raise UserError("llama.cpp reads no BPE without merges; train with a larger vocab_size or more text")
        tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    else:  # pieces of one character, "t5" there, which writes a space as U+2581 and takes unknown characters in a row for one
        tokens = [{" ": "\u2581", "\u2581": "<U+2581>"}.get(character, character) for character in ours.vocabulary]
        writer.add_tokenizer_model("t5")
        writer.add_token_scores([0.0] * ours.size)
        writer.add_add_space_prefix(False)
        writer.add_remove_extra_whitespaces(False)
    writer.add_token_list([SPECIALS[UNK], "\n", SPECIALS[PAD], *tokens])
    writer.add_token_types([kind.UNKNOWN, kind.USER_DEFINED, kind.CONTROL] + [kind.NORMAL] * len(tokens))
    writer.add_unk_token_id(UNK)
    writer.add_eot_token_id(SEP)
    writer.add_eos_token_id(PAD)
    writer.add_pad_token_id(PAD)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def qwen3(model, size):
    """(weights, configuration) of Qwen3ForCausalLM, for the first `size` ids: what a classifier adds is left out. It does not
    normalise look-ups: the rows are stored normalised."""
    c = model.config
    weights = {"model.embed_tokens.weight": rms_norm(model.embedding.weight[:size]), "model.norm.weight": model.norm.weight,
               "lm_head.weight": model.head.weight[:size]}
    for layer, block in enumerate(model.blocks):
        weights |= {f"model.layers.{layer}.{theirs}.weight": block.get_submodule(ours).weight for ours, theirs in QWEN3.items()}
    return weights, dict(
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_size=c.n_embd, intermediate_size=c.hidden_size,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_size,
        hidden_act="silu", max_position_embeddings=c.block_size, rms_norm_eps=1e-6, attention_bias=False, tie_word_embeddings=False,
        rope_theta=10000.0, rope_parameters=dict(rope_type="default", rope_theta=10000.0))


def gpt2(model, size):
    """(weights, configuration) of GPT2LMHeadModel: matrices transposed, q, k and v in one, every head with its own k and v."""
    c = model.config
    weights = {"transformer.wte.weight": model.embedding.weight[:size], "transformer.wpe.weight": model.positions.weight}
    if not c.tied:
        weights["lm_head.weight"] = model.head.weight[:size]

    def put(name, weight, bias):
        weights[f"transformer.{name}.weight"] = weight
        weights[f"transformer.{name}.bias"] = torch.zeros(weight.shape[-1]) if bias is None else bias

    def every_head(parameter):
        return parameter.unflatten(0, (c.n_kv_head, -1)).repeat_interleave(c.n_head // c.n_kv_head, dim=0).flatten(0, 1)

    put("ln_f", model.norm.weight, model.norm.bias)
    for layer, block in enumerate(model.blocks):
        attention = block.attention
        weight = torch.cat([attention.q.weight, every_head(attention.k.weight), every_head(attention.v.weight)])
        bias = torch.cat([attention.q.bias, every_head(attention.k.bias), every_head(attention.v.bias)]) if c.bias else None
        put(f"h.{layer}.attn.c_attn", weight.T, bias)
        put(f"h.{layer}.ln_1", block.norm1.weight, block.norm1.bias)
        put(f"h.{layer}.ln_2", block.norm2.weight, block.norm2.bias)
        for name, linear in (("attn.c_proj", attention.out), ("mlp.c_fc", block.mlp.up), ("mlp.c_proj", block.mlp.out)):
            put(f"h.{layer}.{name}", linear.weight.T, linear.bias)
    return weights, dict(
        architectures=["GPT2LMHeadModel"], model_type="gpt2", n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
        n_positions=c.block_size, n_inner=c.hidden_size, activation_function="gelu", layer_norm_epsilon=1e-5,
        tie_word_embeddings=c.tied)


def tokenizer_of(ours):
    """A `tokenizers.Tokenizer` with the same ids, in which `<sep>` is the newline itself."""
    import tokenizers
    first = {SPECIALS[UNK]: UNK, "\n": SEP, SPECIALS[PAD]: PAD}
    if isinstance(ours, BPETokenizer):
        description = json.loads(ours.description)
        model = description["model"]
        model["vocab"] = first | {token: i + len(SPECIALS) for token, i in model["vocab"].items()}
        theirs = tokenizers.Tokenizer.from_str(json.dumps(description))
        theirs.add_tokens([tokenizers.AddedToken("\n", normalized=False)])
    else:  # byte-pair encoding without pairs: characters
        vocabulary = first | {c: i for i, c in enumerate(ours.vocabulary, len(SPECIALS))}
        theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token=SPECIALS[UNK]))
        theirs.decoder = tokenizers.decoders.Fuse()
    theirs.add_special_tokens([SPECIALS[UNK], SPECIALS[PAD]])
    return theirs


def tokenizer_from(description):
    """Our tokenizer of the JSON of one that `tokenizer_of` made."""
    ids = description["model"]["vocab"]
    pieces = sorted(ids, key=ids.get)
    if pieces[:len(SPECIALS)] != [SPECIALS[UNK], "\n", SPECIALS[PAD]]:
        raise ValueError(f"the first tokens are {pieces[:len(SPECIALS)]}")
    if description["pre_tokenizer"] is None:
        return CharTokenizer("".join(pieces[len(SPECIALS):]))
    model = description["model"] | dict(vocab={piece: i for i, piece in enumerate(pieces[len(SPECIALS):])})
    return BPETokenizer(json.dumps(description | dict(model=model, added_tokens=[], padding=None, truncation=None)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="a .pth of train.py or sentimentalTrain.py, or a folder made from one, trained further or not")
    parser.add_argument("target", help="a new folder for config.json, model.safetensors and tokenizer.json, or a new file NAME.gguf; "
                        "of a folder: a new file NAME.pth")
    options = parser.parse_args()
    export(options.checkpoint, options.target)


if __name__ == "__main__":
    settings_module.main(main)
