# `make demo` trains and samples a small model and writes report.html. `make test` runs the quick tests, `make test-all`
# all tests. Each target first creates the virtual environment .venv if it is missing or requirements.txt has changed.

PYTHON ?= python3
RUN := .venv/bin/python
AUTOENCODER := --config configs/demo_config.py
BOTH := --config configs/demo_latent_config.py --decoder_config configs/demo_config.py
SAMPLE := $(RUN) experiments/generate_samples.py $(BOTH) --sampling_steps 10 \
	--latent_sampler dpm_solver --latent_sampling_steps 50
TEST := $(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile
SCORE := $(RUN) experiments/calculate_fid.py $(AUTOENCODER) --split heldout --feature_model efficientnet_lite0

.PHONY: demo test test-all

demo: .venv/installed
	$(RUN) train_inf_ae_diffusion.py $(AUTOENCODER)
	$(RUN) experiments/generate_recons.py $(AUTOENCODER) --num_samples 64 --sampling_steps 10 --output demo/recons
	$(RUN) train_latent_diffusion.py $(BOTH)
	$(SAMPLE) --output demo/samples_1x
	$(SAMPLE) --output demo/samples_2x --sample_img_size 64 --num_samples 16
	$(SAMPLE) --output demo/samples_4x --sample_img_size 128 --num_samples 16
	$(RUN) experiments/generate_noise.py $(AUTOENCODER) --output demo/noise
	$(SCORE) --samples demo/samples_1x --output demo/samples_scores.json
	$(SCORE) --samples demo/noise --output demo/noise_scores.json
	$(RUN) experiments/report.py $(BOTH) --folder demo --output report.html

test: .venv/installed
	$(TEST) -m "not slow"

test-all: .venv/installed
	$(TEST)

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
