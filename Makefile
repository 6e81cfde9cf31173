# Two commands: `make demo` trains and samples a small model and writes report.html, `make test` runs the tests.
# Both make the virtual environment .venv when it is missing or requirements.txt has changed.

PYTHON ?= python3
RUN := .venv/bin/python
DEMO := --config configs/demo_latent_config.py --decoder_config configs/demo_config.py
SAMPLE := $(RUN) experiments/generate_samples.py $(DEMO) --sampling_steps 50

.PHONY: demo test

demo: .venv/installed
	$(RUN) train_inf_ae_diffusion.py --config configs/demo_config.py
	$(RUN) experiments/generate_recons.py --config configs/demo_config.py --sampling_steps 50 --output demo/recons
	$(RUN) train_latent_diffusion.py $(DEMO)
	$(SAMPLE) --output demo/samples_1x
	$(SAMPLE) --output demo/samples_2x --sample_img_size 64 --num_samples 16
	$(SAMPLE) --output demo/samples_4x --sample_img_size 128 --num_samples 16
	$(RUN) experiments/report.py $(DEMO) --folder demo --output report.html

test: .venv/installed
	$(RUN) -m pytest

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
