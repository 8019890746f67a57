"""What do options and normalisation between layers do? Nine speakers from 270 utterances, with and without.

Every row is the same two-layer network, trained alike from the same seed, with one thing changed.
"""

import logging
import sys
import warnings

import lightning as L

from fastrnn.training import JapaneseVowels, Optim, SequenceClassifier, Stack

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")
EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 3
VARIANTS = {
    "plain": {},
    "layer_norm": {"options": {"layer_norm": True}},
    "variational_dropout 0.3": {"options": {"variational_dropout": 0.3}},
    "weight_dropout 0.3": {"options": {"weight_dropout": 0.3}},
    "zoneout 0.1": {"options": {"zoneout": 0.1}},
    "batch norm between layers": {"norm": "batch"},
    "layer norm between layers": {"norm": "layer"},
}
print(f"{'':26} accuracy  loss on the test data, {EPOCHS} epochs")
for name, changes in VARIANTS.items():
    L.seed_everything(0, verbose=False)
    data = JapaneseVowels(batch_size=30, held_out=5)
    stack = Stack("lstm", hidden_size=32, num_layers=2, **changes)
    optim = Optim("adamw", lr=0.005, schedule="cosine", warmup=5)
    model = SequenceClassifier(data.spec, stack, optim, pool="mean")
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(model, data)
    (found,) = trainer.test(model, data, verbose=False)
    print(f"{name:26} {found['test/accuracy']:.3f}     {found['test/loss']:.3f}")
