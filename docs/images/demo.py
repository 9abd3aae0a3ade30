"""Makes demo.png: edits of whole photographs by the shipped model, chosen by rank and not by hand.

`COUNT` random edits of the held-out photographs at their own size are ranked by the composite's PSNR against the true
target. Shown are the best, the median and the worst of those that the generator judges done, and the worst of the
others. Run from the root of the repository: `python docs/images/demo.py`.
"""

from pathlib import Path

import numpy as np

from thinkclearly import load_editor
from thinkclearly.data.sources import photos_of
from thinkclearly.demo import photo_edits
from thinkclearly.evaluation.edits import evaluate_edits
from thinkclearly.models.finetunes import TINY_CLEAR
from thinkclearly.reporting.pictures import heat_map, sheet

COUNT, CELL = 40, 320
pairs = photo_edits(COUNT, photos_of("test"))
judges = {example.key: edit for edit, example in pairs}
found = evaluate_edits(
    load_editor(str(TINY_CLEAR)),
    (example for _, example in pairs),
    judge=lambda key, picture: judges[key].is_done(picture),
    batch_size=10,
    total=COUNT,
)
ranked = [int(i) for i in np.argsort(-found.scores, kind="stable")]
done = [i for i in ranked if judges[f"photo {i}"].is_done(found.results[i].image)]
failed = [i for i in ranked if i not in done]
names = {
    done[0]: f"best of the {len(done)} done",
    done[len(done) // 2]: f"median of the {len(done)} done",
    done[-1]: f"worst of the {len(done)} done",
    failed[-1]: f"worst of the {len(failed)} not done",
}
rows = []
for index, name in names.items():
    result = found.results[index]
    rows.append(
        [
            (result.source, f"“{result.instruction}”"),
            (result.raw, "what the model draws"),
            (result.image, f"with CLEAR: {found.scores[index]:.1f} dB, {name}"),
            (heat_map(result.image, result.source), "after − before; black is bit-identical"),
        ]
    )
sheet(rows, CELL).save(Path(__file__).with_suffix(".png"), optimize=True)
