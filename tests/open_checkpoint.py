"""Open a saved folder with torch and transformers alone: python open_checkpoint.py FOLDER [FOLDER_TO_SAVE_AGAIN].

The folder also holds waveform.npy. Prints what each auto class and the pipeline give, as JSON. The packages of this
repository are hidden, as on the machine of somebody who has just the checkpoint.
"""

import importlib.abc
import json
import sys

HIDDEN = {"hf_datasets", "modeling_qlung", "train"}


class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"{name} is hidden", name=name)
        return None


def main(folder: str, again: str | None = None) -> None:
    import numpy as np
    from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification, pipeline

    waveform = np.load(f"{folder}/waveform.npy")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
    inputs = extractor(waveform, sampling_rate=extractor.sampling_rate, return_tensors="pt")
    model = AutoModelForAudioClassification.from_pretrained(folder, trust_remote_code=True).eval()
    base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    classify = pipeline("audio-classification", model=folder, trust_remote_code=True)
    result = {
        "config": [type(config).__name__, config.class_priors],
        "classes": [type(base).__name__, type(model).__name__, type(extractor).__name__],
        "logits": model(**inputs).logits.tolist(),
        "embedding": base(**inputs).pooler_output.tolist(),
        "pipeline": {entry["label"]: entry["score"] for entry in classify(waveform)},
    }
    if again is not None:
        model.save_pretrained(again)
        extractor.save_pretrained(again)
    print(json.dumps(result))


if __name__ == "__main__":
    sys.meta_path.insert(0, Hide())
    main(*sys.argv[1:])
