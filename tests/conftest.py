"""What all tests share."""

import os
import subprocess

# Small products on several threads are slower than on one, and threads that wait by spinning disturb their neighbours.
os.environ["OMP_NUM_THREADS"] = "1"
# Processors differ in what `precision: auto` chooses and in what bfloat16 is multiplied in; tests do not.
os.environ["DIFFUSION_MOE_CPU_MATMUL"] = "float32"
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)

TINY = [
    "--model.hidden_size=32",
    "--model.depth=2",
    "--model.num_heads=2",
    "--model.expert_dim=16",
    "--model.num_experts=4",
    "--training.batch_size=16",
    "--training.precision=fp32",
    "--training.ema_warmup=false",
    "--optimizer.warmup_steps=0",
    "--logging.tensorboard=false",
]


LONG = ("distributed", "training", "study", "test_imports.py", "test_cli.py", "test_allocator.py", "test_kernels.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes long, so that no process is left alone with it at the end."""
    items.sort(key=lambda item: not any(name in item.path.parts for name in LONG))


@pytest.fixture(scope="session")
def tiny_options() -> tuple[str, ...]:
    """Options that make the digits recipe small enough for tests."""
    return tuple(TINY)


@pytest.fixture
def tiny(tiny_options: tuple[str, ...]) -> list[str]:
    """The same, as a list of the test's own."""
    return list(tiny_options)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Tests do not depend on their order."""
    torch.manual_seed(0)


@pytest.fixture
def make_disk(tmp_path):
    """Makes a folder on a disk of its own, of so many megabytes."""
    places = []

    def make(megabytes):
        place = tmp_path / f"disk{len(places)}"
        place.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)]
        made = subprocess.run(mount, capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"mounting a small tmpfs is not allowed here: {made.stderr.strip()}")
        places.append(place)
        return place

    yield make
    for place in places:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


WORDS = "a red green blue small large circle square photo of dark bright the left right image"


def _make_tokenizer(folder):
    """A word-level tokenizer of `WORDS` that ends each text with </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return len(vocabulary)


def _make_text_encoder(kind, folder):
    """A tiny T5 encoder, CLIP text model or BERT with random weights, and its tokenizer."""
    import transformers

    torch.manual_seed(0)
    size = _make_tokenizer(folder)
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    common = {"vocab_size": size, **ids}
    if kind == "t5":
        config = transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, **common)
        model = transformers.T5EncoderModel(config)
    else:
        common |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        common |= {"max_position_embeddings": 12}
        config, model = {
            "clip": (transformers.CLIPTextConfig, transformers.CLIPTextModel),
            "bert": (transformers.BertConfig, transformers.BertModel),
        }[kind]
        model = model(config(**common))
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_text_encoder():
    """Saves a tiny encoder of a kind (t5, clip, bert) in a folder, and returns the folder."""
    return _make_text_encoder


@pytest.fixture(scope="session")
def text_encoder_folder(tmp_path_factory):
    """A tiny T5 encoder."""
    return _make_text_encoder("t5", tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, tiny_options):
    """A finished run of a tiny DiffMoE on digits."""
    from diffusion_moe.cli import main

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    options = ["--training.steps=40", "--training.checkpoint_every=20", "--model.router=diffmoe"]
    assert main(["train", "digits", "--output_dir", str(folder), *tiny_options, *options]) == 0
    return folder


TINY_SHAPES = [
    "--model.sample_size=16",
    "--model.patch_size=4",
    "--model.in_channels=3",
    "--model.num_classes=0",
    "--model.text_dim=16",
    "--model.text_length=16",
    "--model.router=diffmoe",
    "--data.kind=shapes",
    "--data.text_length=16",
    "--data.image_size=16",
    "--data.channels=3",
    "--data.test_fraction=0.999",
    "--training.device=cpu",
    "--training.steps=2",
]


@pytest.fixture(scope="session")
def make_shapes_run(tmp_path_factory, tiny_options, text_encoder_folder):
    """Trains a tiny text-to-image DiffMoE, or with options another one, on a hundred scenes of coloured shapes.

    Noise on its weights makes images and routing heed prompts and guidance, as after two steps they would not.
    """

    def make(*more):
        folder = tmp_path_factory.mktemp("runs") / "shapes"
        options = [*tiny_options, *TINY_SHAPES, f"--data.text_encoder={text_encoder_folder}", *more]
        return _train_and_stir(folder, options)

    return make


@pytest.fixture(scope="session")
def shapes_run(make_shapes_run):
    """Such a run without further options."""
    return make_shapes_run()


def _train_and_stir(folder, options):
    from diffusion_moe.cli import main
    from diffusion_moe.models import load_model

    assert main(["train", "digits", "--output_dir", str(folder), *options]) == 0
    torch.manual_seed(0)
    model = load_model(folder / "model")
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    for name, buffer in model.named_buffers():
        if name.endswith("threshold"):
            buffer.fill_(0.5)
    model.save_pretrained(folder / "model")
    return folder
