package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	"sigs.k8s.io/yaml"

	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/kernel/machine"
)

const (
	apiPort       = 6443
	kubeadmConfig = "/etc/kubernetes/kubeadm.yaml"
)

// Of the phases of `kubeadm init` these run before there is an API server, and those of join after. The rest
// is done otherwise: preflight is doctor's, kubelet is started by the node's init, and nodes are made with
// their labels and taints (see nodeObject).
var (
	phasesBefore = []string{"certs", "kubeconfig", "etcd", "control-plane"}
	allPhases    = []string{"preflight", "certs", "kubeconfig", "etcd", "control-plane", "kubelet-start", "wait-control-plane",
		"upload-config", "upload-certs", "mark-control-plane", "bootstrap-token", "kubelet-finalize", "addon", "show-join-command"}
)

// heldManifests are of two static pods that need an API server to start with, and are held until there is one. Without it
// they wait in ever longer steps, or end and are started again 10 s later, and take processor time from the API server that
// they wait for. They wait by themselves until the server is healthy (kit/kubernetes/await), and so can start as soon as it
// serves at all: for a second it waits before it begins with the roles that they need, and then processors are free.
var heldManifests = []string{"kube-controller-manager.yaml", "kube-scheduler.yaml"}

// hold keeps static pods' manifests from kubelet until release.
func hold(m *machine.Machine) error {
	for _, name := range heldManifests {
		if err := moveManifest(m, name, "/etc/kubernetes/manifests", "/etc/kubernetes"); err != nil {
			return err
		}
	}
	return nil
}

// release lets kubelet have them. A lab that goes on as one was whose user took one away has none of it.
func release(m *machine.Machine) error {
	for _, name := range heldManifests {
		err := moveManifest(m, name, "/etc/kubernetes", "/etc/kubernetes/manifests")
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func moveManifest(m *machine.Machine, name, from, to string) error {
	if err := os.Rename(m.File(filepath.Join(from, name)), m.File(filepath.Join(to, name))); err != nil {
		return fmt.Errorf("move a static pod manifest: %w", err)
	}
	return nil
}

// kubeadm runs these phases of `kubeadm init` on the node.
func kubeadm(ctx context.Context, m *machine.Machine, phases []string, skip ...string) error {
	for _, p := range allPhases {
		if !slices.Contains(phases, p) {
			skip = append(skip, p)
		}
	}
	out, err := m.Output(ctx, "kubeadm", "init", "--config="+kubeadmConfig, "--skip-phases="+strings.Join(skip, ","))
	if err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	return nil
}

// sharedPKI is what all control-plane nodes of a cluster have in common: kubeadm's "upload-certs".
var sharedPKI = []string{"ca.crt", "ca.key", "sa.key", "sa.pub", "front-proxy-ca.crt", "front-proxy-ca.key", "etcd/ca.crt", "etcd/ca.key"}

// sharePKI copies the authorities of the first control-plane node to another.
func (l *Lab) sharePKI(first, other string, to *machine.Machine) error {
	for _, name := range sharedPKI {
		path := filepath.Join("/etc/kubernetes/pki", name)
		data, err := os.ReadFile(l.diskFile(first, path))
		if err != nil {
			return fmt.Errorf("share the certificate authorities of %s with %s: %w", first, other, err)
		}
		if err := writeFile(to.File(path), data, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// addOns are manifests that kubeadm wrote, for the cluster's API server to have as soon as it takes them: the
// phases of kubeadm that create the same objects wait for each answer, and are programs to start while there is
// most to do.
type addOns struct {
	proxy []byte // all of kube-proxy
	base  []byte // what CoreDNS's pods need: its service account, roles, configuration and Service
	dns   []byte // CoreDNS's Deployment
}

// printAddOns has kubeadm write the manifests on the first control-plane node.
func (a *assembly) printAddOns(ctx context.Context) error {
	return a.step("kubeadm: manifests of the add-ons", func() error {
		out, err := printAddOn(ctx, a.nodes[0].Machine, "coredns")
		if err != nil {
			return err
		}
		if a.add.base, a.add.dns, err = adaptCoreDNS(out); err != nil {
			return err
		}
		if a.c.Proxy.Kind == topology.ProxyKubeProxy {
			out, err = printAddOn(ctx, a.nodes[0].Machine, "kube-proxy")
			a.add.proxy = []byte(out)
		}
		return err
	})
}

func printAddOn(ctx context.Context, m *machine.Machine, name string) (string, error) {
	return m.Output(ctx, "kubeadm", "init", "phase", "addon", name, "--config="+kubeadmConfig, "--print-manifest")
}

// adaptCoreDNS takes kubeadm's manifest of CoreDNS apart, and changes one thing: kubelet asks every second
// whether it is ready. With kubeadm's ten, a kubelet that has just started waits up to ten seconds before it asks
// for the first time. Letting kubeadm create it and patching it then would roll it out twice.
func adaptCoreDNS(manifest string) (base, deployment []byte, err error) {
	var others bytes.Buffer
	for doc := range strings.SplitSeq(manifest, "\n---\n") {
		doc = strings.TrimPrefix(doc, "---\n")
		if strings.TrimSpace(doc) == "" {
			continue
		}
		var object struct {
			Kind string `json:"kind"`
		}
		if err := yaml.Unmarshal([]byte(doc), &object); err != nil {
			return nil, nil, fmt.Errorf("read kubeadm's manifest of CoreDNS: %w", err)
		}
		if object.Kind != "Deployment" {
			others.WriteString("---\n" + doc + "\n")
			continue
		}
		var d appsv1.Deployment
		if err := yaml.UnmarshalStrict([]byte(doc), &d); err != nil {
			return nil, nil, fmt.Errorf("read kubeadm's Deployment of CoreDNS: %w", err)
		}
		containers := d.Spec.Template.Spec.Containers
		if len(containers) != 1 || containers[0].ReadinessProbe == nil {
			return nil, nil, errors.New("kubeadm's Deployment of CoreDNS has not the one container with a readiness probe that is expected")
		}
		containers[0].ReadinessProbe.PeriodSeconds = 1
		if deployment, err = yaml.Marshal(d); err != nil {
			return nil, nil, err
		}
	}
	if deployment == nil {
		return nil, nil, errors.New("kubeadm's manifest of CoreDNS has no Deployment")
	}
	return others.Bytes(), deployment, nil
}

// errNoBuild says why a cluster that an interrupted `up` left cannot be started as it is.
var errNoBuild = errors.New("the cluster was not brought up to its end")
