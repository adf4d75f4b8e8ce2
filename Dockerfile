# Images of the two programs: `docker build --target operator .` and `docker build --target node .`, with buildx for other platforms.
# Both are built on the Debian that the node's image is made of, so that they meet the libraries that they were linked with.
FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
RUN cargo build --locked --release --package berth-operator --package berth-node --bin berth-operator --bin berth-node

# No shell, no packages, not root: the operator speaks to the API server alone.
FROM gcr.io/distroless/cc-debian12:nonroot AS operator
COPY --from=build /src/target/release/berth-operator /usr/bin/berth-operator
USER 65532:65532
ENTRYPOINT ["/usr/bin/berth-operator"]

# What the agent and the data plane run on a node; `berth-node preflight` says if anything is missing.
FROM debian:bookworm-slim AS node
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
      ca-certificates \
      dmsetup \
      e2fsprogs \
      lvm2 \
      mount \
      qemu-utils \
      thin-provisioning-tools \
      util-linux \
      xfsprogs \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /src/target/release/berth-node /usr/bin/berth-node
ENTRYPOINT ["/usr/bin/berth-node"]
