# Fathom's tasks. `make` alone lists them.
#
# Everything here is built from pinned sources: Fathom itself from the root module, the real programs that a
# lab runs (the kit) from the nested modules under kit/.

SHELL := /bin/sh
.DELETE_ON_ERROR:
# Each build uses all cores by itself; two at once only fight for memory.
.NOTPARALLEL:

VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
PREFIX  ?= /usr/local
DESTDIR ?=
KIT     := bin/kit

# What a package of ours is tested with. A test that needs a namespace makes its own, and needs root.
TESTFLAGS ?=

# Whole-system scenarios run by `make test`, as packages of test/e2e's module, and those of the other targets.
E2E         ?= ./...
BENCHFLAGS  ?=

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 26

# --- what runs -------------------------------------------------------------------------------------------------

.PHONY: up
up: images ## build everything, start the default lab and show that it works
	bin/fathom up
	@echo
	@docs/examples/hello.sh east
	@$(MAKE) --no-print-directory notices # no lab needs them

.PHONY: build
build: kit fathom images notices ## build Fathom, the kit and the local images into bin/

.PHONY: notices
notices: kit fathom images ## say what was built from what: SBOM, licences, digests, into bin/notices (docs/supply-chain.md)
	@. kit/env && cd kit/bom && CGO_ENABLED=0 go build -buildvcs=false -o $(CURDIR)/bin/tools/bom .
	@SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct 2>/dev/null || echo 0) bin/tools/bom -kit $(KIT) -out bin/notices bin/fathom bin/fathom-*

.PHONY: images
images: kit fathom
	@bin/fathom image build

go_build = . kit/env && CGO_ENABLED=0 go build -ldflags "-s -w -X main.version=$(VERSION)"

.PHONY: fathom
fathom: ## build Fathom alone: bin/fathom
	$(go_build) -o bin/ ./cmd/...

.PHONY: install
install: build ## install to PREFIX (/usr/local): bin/fathom, lib/fathom and share
	kit/dist tree bin $(DESTDIR)$(PREFIX)
	rm -f $(addprefix $(DESTDIR)$(PREFIX)/bin/fathom-,agent cni controller init) # where they once were

# What nodes of other clusters may be. Go alone builds the network's programs, for any of them.
NETWORK_ARCHS := amd64 arm64

# The date of the source, which packages have in the place of that of their making.
dist: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 0)
.PHONY: dist
dist: build ## make packages into bin/dist: a .deb for Debian and Ubuntu, a .tar.xz for others, the network's images (docs/packages.md)
	@rm -rf bin/dist bin/network
	@for arch in $(NETWORK_ARCHS); do to=bin/network/$$arch; \
		echo "dist: the network's programs for $$arch ..." && mkdir -p $$to && \
		export GOARCH=$$arch && ($(go_build) -o $$to/ ./cmd/fathom-agent ./cmd/fathom-cni ./cmd/fathom-controller) && \
		kit/build fathom-dns $$to/kit && mv $$to/kit/programs/fathom-dns $$to/ || exit 1; done
	@bin/fathom image network bin/dist/images $(foreach arch,$(NETWORK_ARCHS),--programs $(arch)=bin/network/$(arch))
	@kit/dist images bin/dist/images $(VERSION) bin/dist
	@bin/tools/bom -strict -kit $(KIT) -out bin/notices bin/fathom bin/fathom-*
	@kit/dist packages bin $(VERSION) bin/dist
	@cd bin/dist && sha256sum *.deb *.tar* >SHA256SUMS && ls -lh

.PHONY: generate
generate: ## compile the BPF programs anew; their objects are committed (needs clang and llvm)
	internal/kernel/bpf/compile

.PHONY: clean
clean: ## remove what was built (Go's build cache stays)
	rm -rf bin

# What a package is made of is built again from nothing, in another directory: no cache, no date and no path may show.
.PHONY: dist-check
dist-check: dist ## build the packages again from nothing and compare them, byte by byte (as long as a first build)
	@case $(VERSION) in *-dirty) echo "dist-check: commit first: a clone has only that" >&2; exit 1; esac
	@dir=$$(mktemp -d) && trap 'rm -rf "$$dir"' EXIT && trap 'exit 130' INT TERM && git clone -q . "$$dir/fathom" && \
		GOCACHE=$$dir/cache $(MAKE) --no-print-directory -C "$$dir/fathom" dist && \
		diff bin/dist/SHA256SUMS "$$dir/fathom/bin/dist/SHA256SUMS" && echo "dist-check: the same"

# --- the kit ---------------------------------------------------------------------------------------------------
# Real programs from pinned sources. A program is built again when its module's versions or its main change, or
# kit/build, which says how.

modules := kubernetes containerd addons/coredns addons/dns addons/flannel addons/flannel-cni addons/http-echo
module = kit/$(1)/go.mod kit/$(1)/go.sum $(wildcard kit/$(1)/*.go kit/$(1)/*/*.go) kit/build kit/env

KIT_BIN      := $(addprefix $(KIT)/bin/,kube containerd containerd-shim-runc-v2 ctr runc cnitool)
KIT_CNI      := $(addprefix $(KIT)/cni/,$(shell sed -n 's|.*containernetworking/plugins/plugins/.*/||p' kit/containerd/go.mod))
KIT_PROGRAMS := $(addprefix $(KIT)/programs/,coredns fathom-dns pause agnhost flannel flanneld http-echo)
# In this order: what the default lab runs first.
KIT_FILES    := $(KIT_BIN) $(KIT_CNI) $(KIT_PROGRAMS) $(KIT)/kit.json $(KIT)/debian/packages

.PHONY: kit
kit: ## build the real Kubernetes, etcd, containerd, runc, CNI plugins, CoreDNS ... (about 10 minutes, once)
	@missing=; for f in $(KIT_FILES); do [ -e $$f ] || missing="$$missing $${f##*/}"; done; \
		[ -z "$$missing" ] || { echo "kit: to be built, which takes minutes the first time; Ctrl-C loses nothing that is done:$$missing"; $(MAKE) --no-print-directory deps; }
	@KIT_FILES="$(KIT_FILES)" $(MAKE) -s --no-print-directory $(KIT_FILES)

.PHONY: kit-e2e
kit-e2e: $(KIT)/test/e2e.test ## build Kubernetes' own e2e tests (about 5 minutes, once)

$(KIT)/bin/kube: $(call module,kubernetes)
$(KIT)/programs/agnhost $(KIT)/programs/pause $(KIT)/test/e2e.test: $(filter-out %.go,$(call module,kubernetes))
$(filter-out %/kube,$(KIT_BIN)): $(call module,containerd)
$(KIT_CNI): $(call module,containerd)
$(KIT)/programs/coredns: $(call module,addons/coredns)
$(KIT)/programs/fathom-dns: $(call module,addons/dns)
$(KIT)/programs/flanneld: $(call module,addons/flannel)
$(KIT)/programs/flannel: $(call module,addons/flannel-cni)
$(KIT)/programs/http-echo: $(call module,addons/http-echo)
$(KIT)/kit.json: $(foreach m,$(modules),$(call module,$(m)))

$(KIT_BIN) $(KIT_PROGRAMS):
	@kit/build $(@F) $(KIT)
$(KIT_CNI) &:
	@kit/build cni $(KIT)
$(KIT)/kit.json:
	@kit/build json $(KIT)
# Packages of the distribution that stand-ins are made of (docs/design/images.md): unpacked, not installed.
$(KIT)/debian/packages: kit/debian
	@kit/debian $(KIT)/debian
$(KIT)/test/e2e.test:
	@kit/build e2e $(KIT)

# --- tests -----------------------------------------------------------------------------------------------------

.PHONY: test
test: build lint ## all tests: units, the kernel's namespaces, the kit, whole labs (as root)
	go vet ./...
	internal/kernel/bpf/compile check
	@$(MAKE) --no-print-directory units
	kit/check $(KIT)
	@$(MAKE) --no-print-directory e2e conformance-short conformance-policy-short

# What is left out is the race detector, the other scenarios and the kit's own tests. Packages that have not changed are not tested again.
.PHONY: quick
quick: build lint ## what most changes need: lint, tests of packages, the scenario "default" (as root; minutes)
	go test ./...
	cd test/e2e && FATHOM=$(CURDIR)/bin/fathom go test -count=1 -run '^TestScenarios$$/^default$$' .

# The race detector needs cgo, which the programs are built without.
.PHONY: units
units: ## tests of packages, with the race detector (as root)
	CGO_ENABLED=1 go test -race $(TESTFLAGS) ./...
	cd kit/addons/dns && CGO_ENABLED=1 go test -race $(TESTFLAGS) ./...
	cd kit/kubernetes && go test $(TESTFLAGS) ./start ./await ./etcdstate
	cd kit/bom && go test $(TESTFLAGS) ./...

.PHONY: e2e
e2e: build ## whole-system scenarios in real labs
	cd test/e2e && FATHOM=$(CURDIR)/bin/fathom go test -count=1 -timeout 60m $(TESTFLAGS) $(E2E)

# VM_SCENARIOS are scenarios of test/e2e, or "all".
.PHONY: vm-test
vm-test: build ## some scenarios on a Debian with cgroup v2 alone, in a virtual machine (test/vm/README.md; slow without KVM)
	test/vm/run $(VM_SCENARIOS)

# FOCUS and SKIP choose among the specs by pattern; NETWORK, PROXY, PROXY_MODE, IP_FAMILY and WORKERS say what lab
# they run in, or LAB which one that is up; ALL=1 runs also what cannot pass. docs/conformance.md tells more.
conformance_options = FOCUS SKIP NETWORK PROXY PROXY_MODE IP_FAMILY WORKERS LAB ALL
export $(conformance_options)

.PHONY: conformance
conformance: build kit-e2e bin/tools/conformance ## Kubernetes' own tests of networking, the score into docs/conformance.md (about 4 minutes)
	@bin/tools/conformance --focus "$$FOCUS" --skip "$$SKIP" --network "$$NETWORK" --proxy "$$PROXY" --proxy-mode "$$PROXY_MODE" \
		--ip-family "$$IP_FAMILY" --name "$$LAB" --workers "$${WORKERS:-2}" $${ALL:+--all}

.PHONY: conformance-short
conformance-short: build kit-e2e bin/tools/conformance ## a few of them that tell most (about a minute)
	@bin/tools/conformance --short --board none --network "$$NETWORK" --proxy "$$PROXY" --proxy-mode "$$PROXY_MODE" --ip-family "$$IP_FAMILY"

.PHONY: bin/tools/conformance
bin/tools/conformance:
	@go build -trimpath -o $@ ./test/conformance

# CNP_RUN is a pattern of tests, as `go test -run` takes it: TestConformance/CNPAdminTierPriorityField. Without, all run and there is a report.
export CNP_RUN

.PHONY: conformance-policy
conformance-policy: build bin/tools/policy-conformance.test ## network-policy-api's own tests of ClusterNetworkPolicy, and the report (about 5 minutes)
	@kit/conformance-policy/run bin/tools/policy-conformance.test $${CNP_RUN:+-test.run "$$CNP_RUN"}

# The tiers beside NetworkPolicies, their order, and ports with names.
.PHONY: conformance-policy-short
conformance-policy-short: ## a few of them that tell most (about a minute)
	@CNP_RUN='TestConformance/(CNPAdminTierIntegration|CNPAdminTierPriorityField|CNPAdminTierEgressNamedPort|CNPBaselineTierIngressTCP)' \
		$(MAKE) --no-print-directory conformance-policy

.PHONY: bin/tools/policy-conformance.test
bin/tools/policy-conformance.test:
	@CGO_ENABLED=0 go test -C kit/conformance-policy -trimpath -c -o $(CURDIR)/$@ .

.PHONY: picture
picture: build ## draw docs/pictures/terminal.svg, of a lab that starts and ends with it (a minute, as root)
	PATH="$(CURDIR)/bin:$$PATH" go run ./docs/pictures/record 'fathom up' 'fathom kubectl --cluster east -- apply -f docs/examples/hello.yaml' \
		'fathom kubectl --cluster east -- wait pod --all --for=condition=Ready' 'fathom service show hello --from toolbox' 'fathom ping --all' 'fathom down'

.PHONY: bench
bench: build ## measure start-up, memory and disk, into docs/benchmarks.md (4 minutes, as root, on an idle machine)
	CGO_ENABLED=0 go run ./bench/labs $(BENCHFLAGS)

.PHONY: bench-pods
bench-pods: build ## measure the pod network beside flannel, bridge and ptp, into docs/benchmarks.md (5 minutes, as root, idle; BENCHFLAGS)
	CGO_ENABLED=0 go run ./bench/pods $(BENCHFLAGS) >bin/bench-pods.txt
	@go run ./bench/section pods bin/bench-pods.txt

.PHONY: bench-policy
bench-policy: build bin/tools/kube-network-policies ## measure NetworkPolicies beside none, chains and kube-network-policies, into docs/benchmarks.md (5 minutes, as root, idle; BENCHFLAGS)
	CGO_ENABLED=0 go run ./bench/policies $(BENCHFLAGS) >bin/bench-policies.txt
	@go run ./bench/section policies bin/bench-policies.txt

# Upstream's program, whose modules are older than ours.
bin/tools/kube-network-policies:
	@mkdir -p bin/tools && dir=$$(mktemp -d) && GOBIN=$$dir CGO_ENABLED=0 go install -trimpath sigs.k8s.io/kube-network-policies/cmd@v0.8.0 && mv $$dir/cmd $@ && rmdir $$dir

.PHONY: bench-nodes
bench-nodes: build ## measure an agent in a cluster of 1,000 nodes: its start, and one node that changes (as root, idle)
	go test ./internal/agent -run '^$$' -bench ThousandNodes -benchtime 1x -v

.PHONY: bench-services
bench-services: build ## measure Services beside kube-proxy, into docs/benchmarks.md (5 minutes, as root, idle; BENCHFLAGS)
	bin/fathom bench services $(BENCHFLAGS) >bin/bench-services.txt
	@go run ./bench/section services bin/bench-services.txt

.PHONY: bench-dns
bench-dns: build ## measure the node's DNS cache beside CoreDNS, into docs/benchmarks.md (2 minutes, as root, idle; needs dnsperf)
	sh bench/dns/bench.sh bin/kit/programs/fathom-dns bin/kit/programs/coredns >bin/bench-dns.txt
	@go run ./bench/section dns bin/bench-dns.txt

.PHONY: lint
lint: bin/tools/golangci-lint ## static checks of all modules of ours
	bin/tools/golangci-lint run ./...
	@for m in kit/kubernetes kit/addons/coredns kit/addons/dns kit/bom kit/conformance-policy $(patsubst %/go.mod,%,$(wildcard test/e2e/go.mod)); do \
		echo "lint: $$m" && (cd $$m && CGO_ENABLED=0 $(CURDIR)/bin/tools/golangci-lint run -c $(CURDIR)/.golangci.yml ./...) || exit 1; done

bin/tools/golangci-lint: kit/tools/go.mod kit/tools/go.sum
	@echo "tools: golangci-lint, which takes minutes the first time ..."
	@cd kit/tools && CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "-s -w" -o $(CURDIR)/$@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint

# --- what the host must have -----------------------------------------------------------------------------------

.PHONY: deps
deps: ## install what is missing on this machine to build and to run (Debian, Ubuntu; elsewhere: name it)
	@kit/deps
