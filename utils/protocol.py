"""What a score was computed from, in words, and where that departs from the paper's protocol."""

PAPER = {"num_samples": 50_000, "sampler": "ddim", "steps": 100, "eta": 0.0, "feature_model": "clip_vit_b_32",
         "crops": None}
WORDS = {"num_samples": "{} samples", "sampler": "{}", "steps": "{} steps", "eta": "eta {}",
         "feature_model": "features of {}", "crops": "crops"}
UNKNOWN = "made in an unknown way"


def describe(facts):
    """One line about the protocol of facts: num_samples, size [H, W] of the samples, sampling (settings of their
    folder, {} where it has none), real_images (lines that describe them), feature_model, crops (their number or None)
    and crop_size."""
    made, (height, width), differences = facts["sampling"], facts["size"], departures(facts)
    how = f" by {made['sampler']} in {made['steps']} steps" if "sampler" in made else f", {made.get('what', UNKNOWN)}"
    cut = f"{facts['crops']} crops of {facts['crop_size']}² of each; " if facts["crops"] else ""
    return (f"{facts['num_samples']} samples of {height}x{width}{how}; {' and '.join(facts['real_images'])}; "
            f"{cut}8 bits, not flipped; features of {facts['feature_model']}; "
            + (f"not the paper's, with {', '.join(differences)}" if differences else "the paper's"))


def departures(facts):
    """Phrases for where facts (see describe) differ from 50,000 samples by 100 steps of DDIM in CLIP ViT-B/32 features.

    That samples were made in an unknown way is a difference.
    """
    unknown = {**PAPER, "sampler": facts["sampling"].get("what", "an unknown sampler")}
    found = {**unknown, **facts["sampling"], **facts}
    return [WORDS[name].format(found[name]) for name, value in PAPER.items() if found[name] != value]
