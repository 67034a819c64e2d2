package lab

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/internal/durable"
	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/kernel/gate"
	"github.com/fathom-network/fathom/internal/lab/image"
	"github.com/fathom-network/fathom/internal/lab/stored"
	"github.com/fathom-network/fathom/internal/lab/template"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// templateFile returns where the cluster's template is, and whether clusters like it have one. What kube-apiserver reads of the host may
// change what it stores and how, such as a configuration of encryption: such a cluster is made the long way.
func (l *Lab) templateFile(c *topology.Cluster) (string, bool) {
	if len(c.APIServerVolumes) > 0 {
		return "", false
	}
	programs, err := l.programs()
	if err != nil {
		return "", false
	}
	like := *c
	like.Nodes = slices.Clone(c.Nodes)
	for i := range like.Nodes {
		like.Nodes[i].Wire, like.Nodes[i].Mounts = topology.Wire{}, nil // no object tells of them
	}
	key, err := template.Key(programs, struct {
		Cluster topology.Cluster
		OOM     int // it is in the configurations of kubelet and kube-proxy
	}{like, oomScore()})
	if err != nil {
		return "", false
	}
	return filepath.Join(l.Paths.Cache, "templates", key+".json.zst"), true
}

// programs tells the programs apart that a cluster is made by and of: this one, Kubernetes', and the images.
func (l *Lab) programs() (string, error) {
	own, err := os.Executable()
	if err != nil {
		return "", err
	}
	index, err := os.ReadFile(filepath.Join(l.Kit.ImagesDir(), "index.json"))
	if err != nil {
		return "", err
	}
	all := fmt.Sprintf("%+v\n%s\n", l.Kit.Versions, index)
	for _, path := range []string{own, l.Kit.Bin("kube")} {
		info, err := os.Stat(path)
		if err != nil {
			return "", err
		}
		all += fmt.Sprintf("%d %d\n", info.Size(), info.ModTime().UnixNano())
	}
	return all, nil
}

// readTemplate returns the cluster's template, or nil if there is none that can be used.
func (l *Lab) readTemplate(c *topology.Cluster) *template.Template {
	path, ok := l.templateFile(c)
	if !ok {
		return nil
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	t, err := template.Decode(data)
	if err != nil {
		return nil // saveTemplate writes over it
	}
	return t
}

// writtenForNodes are the files of a control-plane node's /etc/kubernetes that are each node's own, and that the lab writes itself.
var writtenForNodes = []string{managerCert, managerKey, schedulerCert, schedulerKey}

// saveTemplate makes a template of the cluster, which has been made the long way and in which everything answers. That none could be made is
// no fault of the cluster's: say is told.
func (a *assembly) saveTemplate(ctx context.Context) error {
	path, ok := a.templateFile(a.c)
	if !ok {
		return nil
	}
	return a.t.detailed(a.c.Name, "leave a template", func(say func(string)) error {
		if err := a.makeTemplate(ctx, path); err != nil {
			if ctx.Err() != nil {
				return err
			}
			say("clusters like this one start the long way: " + err.Error())
		}
		return nil
	})
}

func (a *assembly) makeTemplate(ctx context.Context, path string) error {
	first := a.nodes[0]
	state, err := a.etcdState(ctx, a.c, first.Node, first.Machine)
	if err != nil {
		return err
	}
	planes, public, err := a.planeDisks(a.c, isPlanesOwn)
	if err != nil {
		return err
	}
	t, err := template.New(state, stored.Identity{Underlay4: a.Underlay4, Underlay6: a.Underlay6, Public: public}, planes, a.add.dns)
	if err != nil {
		return err
	}
	data, err := t.Encode()
	if err != nil {
		return err
	}
	if err := durable.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	if err := durable.WriteFile(path, data, 0o600); err != nil {
		return err
	}
	return sweepTemplates(filepath.Dir(path))
}

// keptTemplates is how many templates there may be. One is as large as a picture, and those of older programs are of no use any more.
const keptTemplates = 40

// sweepTemplates removes the oldest templates.
func sweepTemplates(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var files []fs.FileInfo
	for _, e := range entries {
		if info, err := e.Info(); err == nil {
			files = append(files, info)
		}
	}
	slices.SortFunc(files, func(a, b fs.FileInfo) int { return b.ModTime().Compare(a.ModTime()) })
	for _, f := range files[min(len(files), keptTemplates):] {
		if err := os.Remove(filepath.Join(dir, f.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// beginning is what a cluster begins with that is not made the long way.
type beginning struct {
	state stored.State
	files map[string]map[string][]byte // of control-plane nodes, by node and name, relative to /etc/kubernetes
}

// buildFrom makes the cluster from a template.
func (a *assembly) buildFrom(ctx context.Context, store image.Store, t *template.Template) error {
	begins := func() (beginning, error) {
		var nodes []*corev1.Node
		for _, n := range a.nodes {
			nodes = append(nodes, a.nodeObject(a.c, n.Node))
		}
		now := time.Now()
		cluster, err := t.Cluster(a.Underlay4, a.Underlay6, nodes, now)
		if err != nil {
			return beginning{}, err
		}
		err = cluster.State.AddSecret(bootstrapToken(now), now)
		return beginning{cluster.State, cluster.Files}, err
	}
	boot := func(ctx context.Context, n *node) error { return a.bootNew(ctx, n, store) }
	if err := a.begin(ctx, "make the cluster of its template", begins, boot, nil); err != nil {
		return err
	}
	podsBegin := make(chan struct{})
	a.manifests.apply(a.c, a.client, podsBegin)
	a.add = addOns{dns: t.CoreDNS}
	if err := a.installAddOns(ctx, func() { close(podsBegin) }); err != nil {
		return err
	}
	if err := concurrently(ctx, a.waitProxy, func(ctx context.Context) error { return a.waitUsable(ctx, nil) }); err != nil {
		return err
	}
	return a.setBuilt(a.c)
}

// begin boots all nodes at once, and starts an API server on what the cluster begins with, and the kubelets. With it are there the pods: kubelets
// begin with what they run without a controller or a scheduler, and find what booted, if there is such a function, has made on nodes that run.
func (a *assembly) begin(ctx context.Context, step string, what func() (beginning, error), boot func(context.Context, *node) error, booted func(context.Context) error) error {
	var b beginning
	var state []byte // as `kube etcd-state restore` reads it
	err := concurrently(ctx,
		func(context.Context) error {
			return a.step(step, func() error {
				var err error
				if b, err = what(); err != nil {
					return err
				}
				state, err = json.Marshal(b.state)
				return err
			})
		},
		func(ctx context.Context) error {
			return a.step(fmt.Sprintf("boot %d node%s", len(a.nodes), plural(len(a.nodes))), func() error {
				return each(ctx, a.nodes, bootLimit, boot)
			})
		})
	if err != nil {
		return err
	}
	if err := a.startBalancer(ctx, a.c); err != nil {
		return err
	}
	planes := a.planes()
	err = a.step("give the nodes their credentials", func() error {
		return each(ctx, planes, len(planes), func(ctx context.Context, n *node) error { return a.writePlane(ctx, n, b.files[n.Name], state) })
	})
	if err != nil {
		return err
	}
	if err := a.writeCredentials(a.nodes); err != nil {
		return err
	}
	if booted != nil {
		if err := booted(ctx); err != nil {
			return err
		}
	}
	gates, err := openGates(planes, b.files)
	if err != nil {
		return err
	}
	defer closeAll(gates)
	err = a.step("start kubelet on the control plane", func() error { return each(ctx, planes, len(planes), startNodesKubelet) })
	if err != nil {
		return err
	}
	if a.client, err = kube.Connect(a.diskFile(planes[0].Name, "/etc/kubernetes/super-admin.conf")); err != nil {
		return err
	}
	if len(gates) == 0 {
		if err := a.startAPIServer(ctx); err != nil {
			return err
		}
		return a.startWorkers(ctx)
	}
	parts := []func(context.Context) error{a.startAPIServer, a.startWorkers}
	for _, g := range gates {
		parts = append(parts, g.Pass)
	}
	return concurrently(ctx, parts...)
}

// openGates has the kernel keep the connections to API servers that do not listen yet. A kubelet that is refused asks again after a second or
// more; one that is kept waiting registers and hears of its pods as soon as it can be answered, and what it does before that it does
// while the API server starts. There are none where the kernel cannot, nor where an API server, such as that of a lab which was saved by an
// earlier Fathom, would not share the port.
func openGates(planes []node, files map[string]map[string][]byte) (gates []*gate.Gate, err error) {
	for _, n := range planes {
		if !bytes.Contains(files[n.Name]["manifests/kube-apiserver.yaml"], []byte("--permit-port-sharing=true")) {
			closeAll(gates)
			return nil, nil
		}
		g, err := gate.Open(n.NetNS(), apiPort)
		if err != nil {
			closeAll(gates)
			if errors.Is(err, gate.ErrUnsupported) {
				return nil, nil
			}
			return nil, fmt.Errorf("node %s: %w", n.Name, err)
		}
		gates = append(gates, g)
	}
	return gates, nil
}

func closeAll(gates []*gate.Gate) {
	for _, g := range gates {
		g.Close()
	}
}

// writePlane gives a control-plane node its files and its etcd the state. Its kubelet does not run yet.
func (a *assembly) writePlane(ctx context.Context, n *node, files map[string][]byte, state []byte) error {
	for name, data := range files {
		if slices.Contains(heldManifests, filepath.Base(name)) {
			name = filepath.Base(name) // until release
		}
		if err := writeFile(n.File(filepath.Join("/etc/kubernetes", name)), data, 0o600); err != nil {
			return err
		}
	}
	cmd := exec.CommandContext(ctx, a.Kit.Bin("kube"), "etcd-state", "restore", "--data-dir="+a.diskFile(n.Name, "/var/lib/etcd"),
		"--name="+n.Name, "--peer-url="+a.peerURL(a.c, n.Node), "--initial-cluster="+a.etcdMembers(a.c))
	cmd.Stdin = bytes.NewReader(state)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("give the etcd of node %s its objects: %w\n%s", n.Name, err, out)
	}
	return nil
}

// bootstrapToken is a new one of what kubeadm makes for nodes that join. https://kubernetes.io/docs/reference/access-authn-authz/bootstrap-tokens/
func bootstrapToken(now time.Time) *corev1.Secret {
	text := strings.ToLower(rand.Text() + rand.Text())
	id, secret := text[:6], text[6:22]
	return &corev1.Secret{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"},
		ObjectMeta: metav1.ObjectMeta{Name: "bootstrap-token-" + id, Namespace: metav1.NamespaceSystem},
		Type:       corev1.SecretTypeBootstrapToken,
		Data: map[string][]byte{
			"token-id": []byte(id), "token-secret": []byte(secret),
			"expiration":                     []byte(now.Add(24 * time.Hour).UTC().Format(time.RFC3339)),
			"auth-extra-groups":              []byte("system:bootstrappers:kubeadm:default-node-token"),
			"usage-bootstrap-authentication": []byte("true"), "usage-bootstrap-signing": []byte("true"),
		},
	}
}
