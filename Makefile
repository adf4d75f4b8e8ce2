# Every target works from a clean clone on Debian with Rust (rust-toolchain.toml) and Go installed.
.PHONY: help setup demo test e2e chart bench lint

help: ## what the targets do
	@sed -n 's/^\([a-z0-9]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

setup: ## install what is missing of the machine's programs, build the test control plane
	@e2e/setup.sh
	@cargo run --quiet --package berth-e2e --bin e2e-tools

demo: setup ## the quickstart for real on this machine, as root: import an image, mount volumes of it, take all away
	cargo build --package berth-operator --package berth-node --package berth-testkit --package berth-e2e --bins
	@cargo run --quiet --package berth-e2e --bin berth-demo

test: setup ## every test, the long ones short; the last line counts them
	@cargo xtask test

e2e: setup ## the end-to-end suite at full length
	@BERTH_E2E_LONG=1 cargo xtask test --package berth-e2e

chart: setup ## the scenarios of the Helm chart alone
	@cargo xtask test --package berth-e2e --test suite -- chart::

bench: ## side by side with other tools
	@cargo xtask bench

lint: ## formatting, lints, documentation
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- --deny warnings
	RUSTDOCFLAGS="--deny warnings" cargo doc --workspace --no-deps
