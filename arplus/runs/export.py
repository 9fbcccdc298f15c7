"""Checkpoints for others: ours without the optimizer's state, or the paper code's weights in our form.

The result is a checkpoint like any other, so evaluation, chat and ``--init-from`` take it; beside ``config.json`` and
``weights.safetensors``, which torch and safetensors alone can load, it holds a model card.
"""

import json
from dataclasses import replace

from arplus import storage
from arplus.config import ExampleRules, ExportConfig, preset, to_dict
from arplus.errors import UsageError
from arplus.model.cost import live_parameters
from arplus.model.network import PersonaTransformer
from arplus.model.reference import infer, load_reference, parse_state
from arplus.runs import checkpoint
from arplus.runs.checkpoint import TrainProgress, TrainState
from arplus.text import Vocabulary

_CARD = "README.md"


def export(config: ExportConfig) -> str:
    """Writes the export and returns its URI.

    Raises :class:`UsageError` where the source is not a checkpoint, where weights, preset and vocabularies do not fit,
    and where the output holds anything but a previous export, for all in it is deleted.
    """
    source, state = None, None
    if config.checkpoint:
        source, state = checkpoint.load_found(config.checkpoint)
    _check_output(config, source)
    state = state or from_reference(config)
    state = replace(state, moments={}, mlflow_run_id=None)
    return checkpoint.write(storage.absolute(config.output), state, {_CARD: model_card(state).encode()})


def from_reference(config: ExportConfig) -> TrainState:
    """The paper code's weights with our names."""
    run = preset(config.preset)
    given = {name: getattr(config, name) or getattr(run.model, name) for name in ("heads", "layers", "memory_hops")}
    base = replace(run.model, **given)
    if base.repeats > 1:
        base = replace(base, repeats=base.layers)
    uri = str(config.from_reference)
    weights = parse_state(storage.read_bytes(uri), uri)
    model_config, sizes = infer(weights, base)
    characters = Vocabulary.load(str(config.character_vocabulary))
    persona_words = Vocabulary.load(str(config.persona_vocabulary))
    _check_size("--character-vocabulary", characters, sizes.characters)
    if model_config.memory_hops:
        _check_size("--persona-vocabulary", persona_words, sizes.persona_words)
    model = load_reference(weights, model_config, sizes)
    return TrainState(
        config=replace(run, model=model_config),
        progress=TrainProgress(fingerprint="the paper's code"),
        schedule={},
        rules=ExampleRules(),  # the defaults are the paper's
        characters=characters,
        persona_words=persona_words,
        weights=model.weights(),
        moments={},
    )


def model_card(state: TrainState) -> str:
    """What the exported model is, as the README of its folder."""
    config, progress = state.config, state.progress
    model = PersonaTransformer(config.model, state.sizes)
    rows = "\n".join(f"| {part} | {count:,} |" for part, count in live_parameters(model).items())
    needed, features = "", config.model.features
    if features.path is not None:
        of_what = f"{features.path} (weights of SHA-256 `{features.digest}`)"
        needed = f"\nIts features are of {of_what}, which `arplus.pretrained.features.attach` adds.\n"
    best = f"{progress.best_response_ppl:.3f}" if progress.best_response_ppl else "not measured"
    return f"""---
language: zh
library_name: arplus
tags: [dialogue, persona]
---

# {config.run_name or config.preset}: a persona-aware Chinese dialogue model

Preset `{config.preset}` of arplus, trained on {progress.examples:,} examples (data fingerprint
`{progress.fingerprint}`). {config.objective.compared} on validation: {best}. It knows contexts of at most
{state.rules.max_context_utterances} utterances, each cut to {state.rules.max_utterance_characters} characters.

| component | parameters |
| --- | --- |
{rows}

    import json
    from safetensors.torch import load_file
    from arplus.config import ModelConfig, VocabularySizes, from_dict
    from arplus.model.network import PersonaTransformer

    config = json.load(open("config.json"))
    model = PersonaTransformer(from_dict(ModelConfig, config["model"], source="config.json"), \
VocabularySizes(characters={state.sizes.characters}, persona_words={state.sizes.persona_words}))
    model.load_weights(load_file("weights.safetensors"))
{needed}
PersonalDialog's terms are non-commercial; they bind what is trained on it.

```json
{json.dumps(to_dict(config.model), indent=2)}
```
"""


def _check_output(config: ExportConfig, source: str | None) -> None:
    output = storage.absolute(config.output)
    if source is not None and storage.within(source, output):
        raise UsageError(f"--output {config.output}: would replace the --checkpoint itself; name another folder")
    # A file's own URI has no folder before it, so a file in the folder's place is foreign too.
    found = {uri.removeprefix(f"{output}/") for uri in storage.list_files(output, missing_ok=True)}
    marks = {checkpoint.MANIFEST, _CARD}  # together in an export alone
    if found and not marks <= found <= marks.union(checkpoint.FILES):
        raise UsageError(
            f"--output {config.output}: exists and holds more than a previous export; name a new or an empty folder, "
            "or delete what is in it first"
        )


def _check_size(flag: str, vocabulary: Vocabulary, size: int) -> None:
    if vocabulary.size != size:
        raise UsageError(
            f"{flag}: has {vocabulary.size} tokens with the nine special ones, and the weights are for {size}"
        )
