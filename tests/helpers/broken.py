"""Broken things that users have given to programs like this one, by what they stand in for."""

from __future__ import annotations

from typing import Any

from mutations import DEEP

YAMLS = [  # recipes, or what follows a good one
    b"", b"# nothing\n", b"5", b"- 1\n- 2", b"just words", b"null", b"a: [", b"a: 'b", b"a:\tb\n\tc: d", b"{", b"%",
    b"---\na: 1\n---\nb: 2", b"&a [*a]", b"seed: &a {b: *a}", b"seed: *nobody", b"<<: 5", b"<<: {seed: 1}",
    b"? [1, 2]\n: 3", b"? {a: b}\n: 3", b"1: 2", b"null: 3", b"true: 1",
    b"seed: !!python/object/apply:os.system ['touch owned']", b"seed: !!binary aGVsbG8=", b"seed: !!set {1, 2}",
    b"seed: !own 5", b"seed: 2020-01-01", b"seed: 2020-13-45", b"seed: 0x1F", b"seed: 1_000", b"seed: 12:30:45",
    b"seed: .inf", b"seed: -.nan", b"seed: ???", b"learning_rate: 1e-3x", b"learning_rate: 1e400",
    b"learning_rate: [1e-3]", b"seed: 1\nseed: 2", b"train:\n  seed: 1\ntrain:\n  seed: 2",
    b"seed: 1\ntrain:\n  seed: 2", b"seed: ${oc.env:HOME}", b"output_dir: ${oc.env:NOWHERE}",
    b"output_dir: ${dataset_name}", b"output_dir: ${", b"output_dir: ${x:y}", b"output_dir: ${output_dir}",
    b"model_name_or_path: \xff\xfe", b"seed: \x00", b"\xff\xfes\x00e\x00e\x00d\x00", b"\xef\xbb\xbfseed: 1",
    b'output_dir: "a\\0b"', b"a: " + b"[" * DEEP, b"".join(b" " * i + b"a:\n" for i in range(400)),
    b"{" * DEEP, b"x: " + b"y" * 10**6, b"a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b]\nseed: *c",
    b"\x1b[31mseed: 1", b"seed: 1\r\nbeta: 2\r\n", b"@seed: 1", b"`: 1", b"seed: >\n  1", b"seed: |",
]  # fmt: skip

WORDS = [  # values of a flag
    "", " ", "many", "nan", "inf", "-inf", "1e400", "-1", "0", "1.5", "0x10", "1_000", "１２", "1e-3x", "None", "null",
    "true", "False", "[1]", "{}", "--", "-", "-x", "=", "é", "\udcff", "a\nb", "x" * 5000, "${oc.env:HOME}", "*", "1,2",
    "99999999999999999999",
]  # fmt: skip

STRANGE = [  # arguments behind a good command line
    ["--"], ["-"], ["extra"], ["--nonsense"], ["--nonsense", "1"], ["-m", "x"], ["--seed"], ["--seed", "1", "2"],
    ["--seed=1"], ["--seed="], ["--=1"], ["---seed", "1"], ["-seed", "1"], ["–seed", "1"],
    ["--seed", "1", "--seed", "2"], ["--seed", "1", "--seed", "x"], ["--recipe"], ["--train.seed", "1"],
    ["--use_peft", "maybe"], ["--no-use_peft", "True"], ["--no-seed"], ["--no-no-use_peft"], ["--lora_target_modules"],
    ["--report_to"], ["--loss_weights", "1", "x"], ["--reward_weights"], ["--h"], ["--hel"], [""], ["\udcff"],
]  # fmt: skip

CONFLICTS = [  # flags that no run can use, or not these together, or that are rarely used
    {"reference": "adapter-off"}, {"reference": "none", "ref_model_name_or_path": "."}, {"load_in_4bit": True},
    {"load_in_4bit": True, "load_in_8bit": True, "use_peft": True}, {"load_best_model_at_end": True},
    {"early_stopping_patience": 1}, {"eval_steps": 1, "dataset_test_split": "test"}, {"max_prompt_length": 2000},
    {"max_length": 8, "max_prompt_length": 8}, {"reward_weights": [1.0, 2.0]}, {"server_weights": "w"},
    {"loss_type": "sigmoid,sft", "loss_weights": [1.0]}, {"loss_type": ","}, {"loss_type": "sigmoid,sigmoid"},
    {"loss_type": ""}, {"steps_per_generation": 3, "gradient_accumulation_steps": 2}, {"impl": "triton"},
    {"impl": "cuda"}, {"attn_implementation": "nothing"}, {"attn_implementation": "flash_attention_2"},
    {"dtype": "auto", "bf16": True}, {"lr_scheduler_type": "reduce_lr_on_plateau"},
    {"lr_scheduler_type": "cosine_with_min_lr"}, {"lr_scheduler_type": "inverse_sqrt", "warmup_ratio": 1.0},
    {"lr_scheduler_type": "greedy"}, {"lr_scheduler_type": "warmup_stable_decay"}, {"report_to": ["nothing"]},
    {"report_to": ["tensorboard"]}, {"report_to": ["all"]}, {"callbacks": ["nowhere:X"]}, {"callbacks": ["json:loads"]},
    {"callbacks": ["x"]},
    {"metric_for_best_model": "nothing", "load_best_model_at_end": True, "eval_steps": 1,
     "eval_dataset_name": "rows.jsonl"},
    {"eval_dataset_name": "rows.jsonl", "eval_steps": 1}, {"use_peft": True, "lora_target_modules": ["nothing"]},
    {"use_peft": True, "lora_target_modules": ["lm_head"]}, {"use_peft": True, "lora_target_modules": ["embed_tokens"]},
    {"use_peft": True, "lora_target_modules": ["["]}, {"use_peft": True, "lora_target_modules": ["norm"]},
    {"workspace": 1}, {"learning_rate": 1e30, "max_grad_norm": 0, "max_steps": 2}, {"num_generations": 1},
    {"num_generations": 3}, {"stop_strings": [""]}, {"temperature": 1e-30}, {"temperature": 1e30}, {"top_p": 1e-9},
    {"top_k": 10**9}, {"max_completion_length": 1}, {"max_length": 2}, {"reward_funcs": ["human"]},
    {"reward_funcs": ["human", "human"]}, {"reward_funcs": ["http://127.0.0.1:9/x"]},
    {"server_base_url": "http://127.0.0.1:9"}, {"server_base_url": "not an address"},
    {"server_base_url": "http://[::1"}, {"server_base_url": "http://user:pass@127.0.0.1:9/v1?api_key=5"},
    {"reward_funcs": ["http://"]}, {"use_transformers_continuous_batching": True, "top_k": 5},
    {"dataset_train_split": "nothing"}, {"dataset_test_split": "nothing"}, {"dataset_num_proc": 2},
    {"rounds": 1, "method": "sft"}, {"method": "iterate"}, {"method": "rm"}, {"method_settings": ["beta"]},
    {"method_settings": ["beta=x"]}, {"method_settings": ["betta=1"]}, {"method_settings": ["=1"]},
    {"method_settings": ["loss_type=nothing"]}, {"method_settings": [""]},
    {"mask_truncated_completions": True, "max_completion_length": 1}, {"missing_eos_penalty": 1e308},
    {"grad_clamp": 2.0}, {"prob_gate": 1.0}, {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.0},
    {"rank_margin": 1.0}, {"value_model_name_or_path": "."}, {"reference": "ema"}, {"reference": "cpu-offload"},
    {"reference": "adapter-copy", "use_peft": True}, {"balance_classes": True},
    {"desirable_weight": 0.0, "undesirable_weight": 0.0},
]  # fmt: skip

BROKEN_MESSAGES: list[Any] = [  # in place of a list of messages
    [], [None], ["w1"], [[]], [{}], {"role": "user", "content": "w1"}, [{"role": "user"}], [{"content": "w1"}],
    [{"role": None, "content": "w1"}], [{"role": "user", "content": None}], [{"role": "user", "content": ["w1"]}],
    [{"role": "user", "content": [{"type": "image"}]}], [{"role": 5, "content": "w1"}],
    [{"role": "alien", "content": "w1"}], [{"role": "", "content": ""}], [{"from": "human", "value": "w1"}],
    [{"role": "system", "content": "w1"}], [{"role": "assistant", "content": ""}],
    [{"role": "assistant", "content": None, "tool_calls": "x"}],
    [{"role": "assistant", "content": None, "tool_calls": [{}]}],
    [{"role": "assistant", "content": None, "tool_calls": [{"function": None}]}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
    [{"role": "user", "content": "w1", "name": {"a": [1]}}], [{"role": "user", "content": "w1"}] * 50,
    [{"role": "user", "content": "\ud800"}], [{"role": "user", "content": {"text": "w1"}}],
    [{"role": "user", "content": 5}], [{"role": ["user"], "content": "w1"}],
]  # fmt: skip

STRANGE_TEXTS = [  # in place of a text
    "", " ", "\n\t", "\x00", "w1 \x00 w2", "\ud800", "w1 \udfff", "\x1b[2J", "<eos>", "<eos> <eos>", "\u202e w1",
    "\u200b", "é ü ß", "👨‍👩‍👧", "w1 " * 3000, "w1" * 50000,
]  # fmt: skip

BROKEN_IDS: list[Any] = [  # in place of token ids
    [], [-1], [64], [2**31], [2**63], ["w1"], [1.5], [None], [[1]], [True], "w1", 5, None, {}, [1] * 5000,
]  # fmt: skip

BROKEN_TOOLS: list[Any] = [  # in a column `tools`
    "not json", "[1", "[]", "5", "null", "{}", 5, True, [], [5], [None], [{}], {"a": 1}, [{"type": "function"}],
    [{"function": {"name": None}}], ["x"], "[" * DEEP,
]  # fmt: skip

BROKEN_KWARGS: list[Any] = [  # in a column `chat_template_kwargs`
    5, "x", [1], {}, {"messages": []}, {"tokenize": True}, {"unknown": 1}, {"add_generation_prompt": "x"}, {"tools": 3},
    {"chat_template": "{{ x"}, {"return_tensors": "pt"}, {"conversation": []}, {"return_dict": True}, {"documents": 5},
    {"continue_final_message": True}, {"self": 1},
]  # fmt: skip

TAKEN_COLUMNS = [  # names of further columns
    "prompts", "completions", "completion_ids", "index", "status", "length", "notes", "self", "kwargs", "trainer_state",
    "", "prompt_ids", "ref_chosen_logps", "ref_logps", "margin", "label", "Prompt", " prompt", "é", "a.b", "log_metric",
    "images", "tools", "chat_template_kwargs", "messages", "text",
]  # fmt: skip

LINES = [  # among the lines of a .jsonl file
    b"{", b'{"prompt": "w1"', b"w1", b"null", b"5", b"[]", b'["prompt"]', b'{"prompt": NaN}',
    b'{"prompt": Infinity, "chosen": 1}', b'{"prompt": "w1", "prompt": "w2"}', b'{"prompt": "\\ud800"}',
    b'{"prompt": "\\x"}', b"{'prompt': 'w1'}", b'{"prompt": "w1",}', b'{"prompt": "caf\xe9"}', b"\xff\xfe", b"\x00",
    b'{"prompt": "a\x00b"}', b'{"prompt": "a\tb"}', b'{"prompt": 1' + b"0" * 400 + b"}",
    b'{"prompt": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    b'{"a":' * DEEP + b"1" + b"}" * DEEP, b"{}", b"   ", b"// no", b'{"": ""}',
    b'{"prompt": {"a": {"b": 1}}}', b'{"prompt": "' + b"w1 " * 400_000 + b'"}', b"\x1b[31m{", b'{"extra": 1}',
    b'{"extra": "x"}',
]  # fmt: skip

TEMPLATES = [  # chat templates
    "{% for", "{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{{ messages[99].content }}", "{{ nobody.at.all }}", "",
    "w1", "{{ messages }}", "{% include 'x' %}", "{{ 5 + 'x' }}", "{{ messages | nofilter }}",
    "{% for m in messages %}{{ m['content'][::-1] }}{% endfor %}", "{{ ''.__class__.__mro__ }}",
    "{% for i in range(10**9) %}{% endfor %}", "\x00", "{{ strftime_now('%') }}",
]  # fmt: skip

SETTINGS = {  # in config.json
    "vocab_size": [0, 3, 63, 65, 1000, -1, "64"], "hidden_size": [0, 3, 16, 33, "32", None],
    "num_hidden_layers": [0, 1, 3, -1, "2"], "model_type": ["nobody", "", None, 5, "gpt2", "bert", "t5", "llava"],
    "num_attention_heads": [0, 3, 64], "intermediate_size": [0, 7], "dtype": ["nobody", "int8", 5, "float16"],
    "architectures": [[], ["Nobody"], "x", None, ["BertModel"]],
    "auto_map": [{"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}], "hidden_act": ["nobody", 5],
    "rope_parameters": [{}, 5, {"rope_type": "nobody"}, {"rope_type": "yarn"}],
    "quantization_config": [{}, {"quant_method": "nobody"}, 5, {"quant_method": "gptq", "bits": 4}],
    "tie_word_embeddings": [False, "x"], "max_position_embeddings": [0, 4, "x"], "layer_types": [[], ["x"], 5],
    "eos_token_id": [None, [], [1, 2], 99, -1, "x"], "pad_token_id": [None, 99, -1], "num_labels": [0, 2],
    "id2label": [{}, {"0": "a", "1": "b", "2": "c"}],
}  # fmt: skip

TOKENIZERS = {  # in tokenizer_config.json
    "eos_token": [None, "nobody", 5, {}], "pad_token": [None, "nobody", ""], "unk_token": [None],
    "tokenizer_class": ["Nobody", "BertTokenizer", None, "LlamaTokenizer", "GPT2Tokenizer"],
    "model_max_length": [-1, 0, 2, "x", 1e30], "chat_template": ["{% for", 5, {"default": "x"}, []],
    "added_tokens_decoder": [{"99": {"content": "<x>", "special": True}}, {"a": 1}, []],
    "extra_special_tokens": [5, {"x": None}], "padding_side": ["x"], "auto_map": [{"AutoTokenizer": ["own.T", None]}],
}  # fmt: skip

ADAPTERS = {  # in adapter_config.json
    "base_model_name_or_path": [None, "", "/nowhere", 5, "."], "peft_type": ["nobody", None, "PROMPT_TUNING", "IA3"],
    "task_type": ["nobody", None, "SEQ_CLS"], "r": [0, -1, 3, "x", None],
    "target_modules": [[], ["nobody"], "[", None, 5], "bias": ["all", "x"],
    "modules_to_save": [["lm_head"], ["nobody"]], "lora_alpha": [None, "x"], "nobody": [1],
    "rank_pattern": [{"q_proj": 5}], "trainable_token_indices": [[1], [99]], "layers_to_transform": [[9]],
    "auto_mapping": [5],
}  # fmt: skip

GENERATION = {  # in generation_config.json
    "temperature": [-1, "x", 0], "do_sample": ["x"], "eos_token_id": [[], "x", 99], "top_p": [5, "x"],
    "max_new_tokens": ["x", -1], "cache_implementation": ["nobody"], "pad_token_id": [99], "num_beams": [0, 4, "x"],
    "bos_token_id": ["x"], "stop_strings": ["x"], "num_return_sequences": [3],
}  # fmt: skip

SCORER_BODIES = [  # what a reward function does
    "return 1.0", "return None", "return []", "return [1.0]", "return [None] * len(completions)",
    "return ['x'] * len(completions)", "return [float('nan')] * len(completions)",
    "return [float('inf')] * len(completions)", "return [-1e308] * len(completions)",
    "return [10**400] * len(completions)", "return [[1.0]] * len(completions)", "return [{}] * len(completions)",
    "return {1: 2}", "return 'x' * len(completions)", "return [True] * len(completions)",
    "return [1j] * len(completions)", "yield 1.0", "return iter([1.0] * len(completions))",
    "return (1.0 for _ in completions)", "return range(len(completions))",
    "import numpy; return numpy.ones(len(completions), dtype='float32')",
    "import numpy; return numpy.ones((len(completions), 2))", "import torch; return torch.ones(len(completions))",
    "import torch; return torch.ones(len(completions), requires_grad=True)",
    "import torch; return [torch.tensor(1.0)] * len(completions)", "raise ValueError('no')", "raise ValueError",
    "raise KeyError('x')", "raise Exception", "raise StopIteration", "assert False", "return 1 / 0",
    "import sys; sys.exit(0)", "import sys; sys.exit('bye')", "raise SystemExit", "raise KeyboardInterrupt",
    "return score(prompts, completions, completion_ids)", "raise MemoryError",
    "raise OSError(28, 'No space left on device')", "raise GeneratorExit",
    "class E(Exception):\n        def __str__(self):\n            return 5\n    raise E", "raise StopAsyncIteration",
    "raise UnicodeDecodeError('utf-8', b'x', 0, 1, 'no')", "completions.clear(); return []",
    "prompts[0] = None; columns.clear(); return [1.0] * len(completions)",
    "import os; os.chdir('/'); return [float(len(c)) for c in completions]", "import nowhere", "return nobody",
    "return completions", "return completion_ids", "print('x'); return [float(len(c)) for c in completions]",
    "raise RuntimeError('two\\nlines\\x1b[31m')",
]  # fmt: skip

SCORER_FILES = [  # files of a reward function `score`
    "def score(:\n", "x = " + "(" * DEEP + ")" * DEEP, "score = [" * DEEP, "\x00", "def score():\n    return [1.0]\n",
    "def score(prompts):\n    return [1.0] * len(prompts)\n", "def score(a, b, c, d, e):\n    return []\n",
    "def score(prompts, completions, completion_ids, nobody, **more):\n    return []\n", "score = 5\n",
    "score = None\n", "class score:\n    pass\n", "def other():\n    pass\n", "", "raise ValueError('no')\n",
    "raise SystemExit(0)\n", "import sys\nsys.exit(3)\n", "1 / 0\n", "import nowhere\n", "from nowhere import x\n",
    "raise KeyboardInterrupt\n", "def f():\n    f()\nf()\n", "  indented\n",
    "async def score(completions, **more):\n    return [1.0] * len(completions)\n",
    "async def score(completions, **more):\n    raise ValueError('no')\n",
    "async def score(completions, **more):\n    return 5\n", "del score\n", "assert False\n",
    "# -*- coding: nobody -*-\n", "print('x' * 10)\nscore = print\n", "score = lambda *a, **k: 1 / 0\n",
    "import functools\nscore = functools.partial(max)\n",
    "class S:\n    def __call__(self, completions, **more):\n        return [1.0] * len(completions)\nscore = S()\n",
    "def __getattr__(name):\n    raise RuntimeError('no')\n", "from .x import y\n", "raise Exception()\n",
    "import warnings\nwarnings.warn('x')\ndef score(completions, **more):\n    return [1.0] * len(completions)\n",
]  # fmt: skip

_CALLBACK = "from transformers import TrainerCallback\n\nclass Quiet(TrainerCallback):\n    def {}:\n        {}\n"
CALLBACK_FILES = [  # files of a callback `Quiet`
    "class Quiet:\n    pass\n", "Quiet = 5\n", "def Quiet():\n    pass\n", "class Quiet(:\n",
    _CALLBACK.format("__init__(self, needed)", "pass"), _CALLBACK.format("__init__(self)", "raise ValueError('no')"),
]  # fmt: skip
CALLBACK_FILES += [
    _CALLBACK.format(f"{event}(self, args, state, control, **more)", body)
    for event in ("on_train_begin", "on_step_end", "on_log", "on_save", "on_train_end")
    for body in ("raise ValueError('no')", "import sys; sys.exit(0)", "control.should_training_stop = 5", "return 5",
                 "state.global_step = 'x'", "1 / 0")
]  # fmt: skip

SPECS = [  # in reward_funcs
    "{file}", "{file}:", ":score", "{file}:nobody", "{file}:score:score", "scorers:score", "nowhere:score",
    "os.path:join", "json:loads", "{file}:__doc__", "{file}::score", ":", "", " ", "nowhere.py:score", "builtins:print",
    "builtins:len", "{folder}:score", "{folder}", "{file}.py:score", "sys:exit", "..:x", ".x:y", "é:é", "{file}:score ",
]  # fmt: skip

IN_JSON: dict[str, dict[str, list[Any]]] = {
    "config.json": SETTINGS, "tokenizer_config.json": TOKENIZERS, "adapter_config.json": ADAPTERS,
    "generation_config.json": GENERATION,
}  # fmt: skip

COMMANDS = [
    "", "dop", "DPO", "../dpo", "--", "--recipe", "--version", "-h", "--help", "recipe", "\udcff", "dpo\n", "None",
]  # fmt: skip

SUFFIXES = ["", ".txt", ".csv", ".JSONL", ".jsonl.gz", ".parquet", ".json", ".arrow", ".zip", "."]

STRANGE_PATHS = {  # by what they are; {whole} is a good one, {end} its suffix, {place} a folder
    "nowhere": "{place}/nowhere{end}", "in nowhere": "{place}/a/b/c/d{end}", "nowhere from here": "./nowhere{end}",
    "long": "{place}/" + "x" * 300 + "{end}", "very long": "/" + "x/" * 3000, "empty": "", "blank": " ", "here": ".",
    "above": "..", "home": "~", "nobody's home": "~nobody/x", "null": "/dev/null", "below a file": "{whole}/x{end}",
    "with a slash": "{whole}/", "a loop": "", "a link to nowhere": "", "a pipe": "", "the other kind": "",
}  # fmt: skip

NAMES = [  # of files and folders that are whole
    "a\nb", "a[1]", "a*?", " a b ", "é ü", "a\udcff", "a::b", "a#b%20", "a\x1b[31m", "a=b,c", "a${b}{c}",
    "-a", "a'\"", "closed",
]  # fmt: skip
