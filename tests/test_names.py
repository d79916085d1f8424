"""The rooms may not import each other, so each names the classes itself; here they are held together."""

import hf_datasets
from hf_datasets.labels import EVENT_TYPES, RECORD_LABELS
from modeling_qlung import QLungConfig
from modeling_qlung.evaluation import CLASS_NAMES, protocols


def test_classes_have_the_same_names_in_the_same_order_everywhere():
    assert tuple(hf_datasets.LABELS) == CLASS_NAMES == tuple(QLungConfig().id2label.values())
    assert tuple(EVENT_TYPES) == tuple(protocols.EVENT_TYPES)
    assert tuple(RECORD_LABELS) == tuple(protocols.RECORD_LABELS)
