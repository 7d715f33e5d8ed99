"""Build the bundled model: vocabulary, pre-training, preference training, export.

    python -m training.build DATA --work build --out lightrm/demo_model

DATA holds corpus_zh_en.txt.gz, pairs_train.jsonl.gz and the held-out files. About two hours on two CPU cores;
a killed run goes on from its last checkpoint in `--work`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import sentencepiece
import torch

from training.network import RewardNetwork, export, open_content_heads
from training.prefer import POLISH, PREFER, Groups, prefer, with_probes
from training.pretrain import pretrain, token_stream, train_vocabulary
from training.records import neighbours, questions_and_answers, read_corpus, read_pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the corpus and the preference pairs")
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="checkpoints and intermediate files")
    parser.add_argument("--out", type=Path, default=Path("lightrm/demo_model"), help="folder of the finished model")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    documents = read_corpus(arguments.data)
    pairs = read_pairs(arguments.data / "pairs_train.jsonl.gz")
    print(f"{len(documents)} documents, {len(pairs)} pairs", flush=True)
    tokenizer_model = train_vocabulary(documents, arguments.work)
    vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))
    network = RewardNetwork()
    if not (arguments.work / "prefer.pt").exists():
        stream = token_stream(documents, pairs, vocabulary)
        print(f"{len(stream) / 1e6:.1f} M tokens an epoch", flush=True)
        pretrain(network, stream, arguments.work)
    open_content_heads(network)
    torch.nn.init.zeros_(network.value_head.weight)
    asked, trained = questions_and_answers(documents), with_probes(network)
    prefer(trained, Groups(pairs, asked, vocabulary), PREFER, arguments.work)
    prefer(trained, Groups(pairs, asked + neighbours(documents), vocabulary), POLISH, arguments.work)
    export(network, tokenizer_model, arguments.out)
    print(f"wrote {arguments.out}", flush=True)


if __name__ == "__main__":
    main()
