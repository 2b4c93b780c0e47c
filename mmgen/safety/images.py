"""Layer 2: what pixels show, before anybody sees them; of what is drawn, and of what users show.

Three kinds of eyes, any of which can be left out: a run of the `classifier` stage with the groups `person` (none, adult, child) and `symbol` (no,
yes); a blocklist of perceptual hashes (pdq.py); and others' classifiers, by `Onnx` or by any object with its `decide`.
"""

import json
from pathlib import Path

import cv2
import numpy as np

from mmgen.data import images as pictures
from mmgen.models.classifier import load_classifier, probabilities
from mmgen.safety.pdq import Blocklist
from mmgen.safety.policy import Decision

DOUBT = 0.05  # a person who is a child with this probability counts as one
GROUPS = {"person": {"none", "adult", "child"}, "symbol": {"no", "yes"}}


class ImageLayer:
    """Decides on pictures uint8 [H, W, 3 or 4] by a policy.

    classifier: workdir of a run of classifier:safety, or its like. blocklist: a file of `pdq.add`. others: objects whose `decide(image)` gives
    {category: probability}. ValueError for a classifier that lacks what GROUPS says, or others that tell what the policy has not.
    """

    def __init__(self, policy, classifier=None, blocklist=None, others=()):
        self.policy, self.others = policy, tuple(others)
        self.classifier = classifier and load_classifier(classifier)
        self.blocklist = Blocklist(blocklist)
        if self.classifier:
            have = {group.name: set(group.classes) for group in self.classifier.groups}
            if any(have.get(name) != classes for name, classes in GROUPS.items()):
                raise ValueError(f"{classifier}: expected the groups {GROUPS}, found {have}")
        if strange := {entry["category"] for entry in self.blocklist.entries} - set(policy.categories):
            raise ValueError(f"{blocklist}: the policy has no categories {sorted(strange)}")

    @property
    def about(self):
        """What a note says of it."""
        return {
            "classifier": bool(self.classifier),
            "blocklist": len(self.blocklist.entries),
            "others": len(self.others),
        }

    def warm(self):
        """Compiles what looks at one picture."""
        if self.classifier:
            self.classifier.logits([np.zeros((1, 1, 3), np.uint8)])

    def decide(self, images, edited=False):
        """The `Decision` on pictures that belong together. edited: they are a user's, and are to be changed: of what has a child in it
        nothing is made."""
        images = [image[..., :3] for image in images]
        if self.classifier and images:
            found = self.classifier.probabilities(images)
            flags = self.classifier.flagged(found)
        for i, image in enumerate(images):
            if entry := self.blocklist.find(image):
                return self.policy.decided(
                    entry["category"],
                    "blocklist",
                    "image",
                    reason=f"This picture is on a list: {entry['why']}.",
                )
            if self.classifier:
                p = {g.name: dict(zip(g.classes, found[g.name][i].tolist())) for g in self.classifier.groups}
                if "yes" in flags[i]["symbol"]:
                    return self.policy.decided(
                        "symbol",
                        "symbol-classifier",
                        "image",
                        harm=p["symbol"]["yes"],
                        reason="It shows a symbol that is not shown.",
                    )
                if edited and p["person"]["child"] >= DOUBT:
                    return self.policy.decided(
                        "child_edit", "person-classifier", "image", harm=p["person"]["child"],
                        reason="There is a child in the picture, or somebody who may be one: such pictures are not changed.",
                    )  # fmt: skip
            for other in self.others:
                told = other.decide(image)
                for category, probability in told.items():
                    if (
                        probability >= other.threshold
                        and self.policy.categories[category]["layers"]["image"] != "allow"
                    ):
                        return self.policy.decided(
                            category,
                            other.name,
                            "image",
                            harm=probability,
                            reason=f"{other.name} takes it for {category.replace('_', ' ')}.",
                        )
        return Decision()


class Onnx:
    """Somebody else's image classifier, an ONNX file with a JSON beside it (FILE.json): `size` [width, height], `mean` and `std` of channels
    from 0 to 1, `labels`: for each output a category of the policy or null, `softmax`: whether outputs are logits of one choice (else each is
    a probability), and the `threshold`. So run, for example, exports of NudeNet's classifier, of CLIP with a linear head, or of
    Falconsai's nsfw_image_detection; mmgen brings none of them."""

    def __init__(self, path):
        self.name, about = Path(path).stem, json.loads(Path(f"{path}.json").read_text("utf-8"))
        lacking = {"size", "mean", "std", "labels", "softmax", "threshold"} - about.keys()
        if lacking:
            raise ValueError(f"{path}.json lacks {', '.join(sorted(lacking))}")
        self.labels, self.threshold, self.softmax = about["labels"], about["threshold"], about["softmax"]
        self.size = tuple(about["size"])
        self.mean, self.std = (np.array(about[name], np.float32) for name in ("mean", "std"))
        self._net = cv2.dnn.readNetFromONNX(str(path))

    def decide(self, image):
        """{category: probability} of an image uint8 [H, W, 3]."""
        x = (pictures.fit(image, *self.size).astype(np.float32) / 255 - self.mean) / self.std
        self._net.setInput(np.ascontiguousarray(x.transpose(2, 0, 1)[None]))
        out = np.asarray(self._net.forward(), np.float64).reshape(1, -1)
        if out.shape[1] != len(self.labels):
            raise ValueError(
                f"{self.name} gives {out.shape[1]} numbers, and its JSON has {len(self.labels)} labels"
            )
        p, found = (probabilities(out, False) if self.softmax else out)[0], {}
        for label, probability in zip(self.labels, p.tolist()):
            if label is not None:
                found[label] = found.get(label, 0.0) + probability
        return found
