# `make demo` trains and samples a small model and writes report.html. `make test` runs the quick tests, `make test-all`
# all tests. Each target first creates the virtual environment .venv if it is missing or requirements.txt has changed.

PYTHON ?= python3
RUN := .venv/bin/python
# make demo DATA=/path/to/folder trains on images of your own; make demo QUICK=1 makes a rough page in two minutes.
NAME := demo$(if $(DATA),_own)$(if $(QUICK),_quick)
ROUGH := $(if $(QUICK),train.max_steps=300 train.plot_samples_steps=0)
FIELDS := run.experiment=$(NAME) $(if $(DATA),data.name=folder data.root_dir=$(DATA)) $(ROUGH)
LATENT_FIELDS := run.experiment=$(NAME)_sampler $(ROUGH) $(if $(QUICK),data.fid_samples=64)
AUTOENCODER := --config configs/demo_config.py $(FIELDS:%=--config.%)
BOTH := --config configs/demo_latent_config.py $(LATENT_FIELDS:%=--config.%) \
	--decoder_config configs/demo_config.py $(FIELDS:%=--decoder_config.%)
STEPS := --sampling_steps $(if $(QUICK),5,10)
SAMPLE := $(RUN) experiments/generate_samples.py $(BOTH) $(STEPS) \
	--latent_sampler dpm_solver --latent_sampling_steps 50
TEST := $(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile
SCORE := $(RUN) experiments/calculate_fid.py $(AUTOENCODER) --split heldout --feature_model efficientnet_lite0

.PHONY: demo test test-all

demo: .venv/installed
	@echo "The demo takes about $(if $(QUICK),4,1.7) times as long as its first training, which tells its time below."
	$(RUN) train_inf_ae_diffusion.py $(AUTOENCODER)
	$(RUN) experiments/generate_recons.py $(AUTOENCODER) --num_samples 64 $(STEPS) --output $(NAME)/recons
	$(RUN) train_latent_diffusion.py $(BOTH)
	$(SAMPLE) --output $(NAME)/samples_1x
	$(SAMPLE) --output $(NAME)/samples_2x --sample_img_size 64 --num_samples 16
	$(SAMPLE) --output $(NAME)/samples_4x --sample_img_size 128 --num_samples 4
	$(SAMPLE) --output $(NAME)/samples_8x --sample_img_size 256 --num_samples $(if $(QUICK),1,4)
	$(if $(QUICK),,$(SAMPLE) --output $(NAME)/zoom --sample_img_size 512 --num_samples 1 --window 0.375 0.375 0.625 0.625)
	$(if $(QUICK),,$(RUN) experiments/generate_noise.py $(AUTOENCODER) --output $(NAME)/noise)
	$(SCORE) --samples $(NAME)/samples_1x --output $(NAME)/samples_scores.json
	$(if $(QUICK),,$(SCORE) --samples $(NAME)/noise --output $(NAME)/noise_scores.json)
	$(RUN) experiments/report.py $(BOTH) --folder $(NAME) --output report.html

test: .venv/installed
	$(TEST) -m "not slow"

test-all: .venv/installed
	$(TEST)

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
