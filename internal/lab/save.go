package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/fathom-network/fathom/internal/durable"
	"github.com/fathom-network/fathom/internal/facts/conflist"
	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/kernel/machine"
	"github.com/fathom-network/fathom/internal/lab/image"
	"github.com/fathom-network/fathom/internal/lab/saved"
	"github.com/fathom-network/fathom/internal/lab/stored"
)

// SaveOptions say how a lab is saved.
type SaveOptions struct {
	// Secrets has Secrets and the clusters' keys in the file.
	Secrets bool
	// Periodic marks one of a row.
	Periodic bool
	// Version is that of the program that saves.
	Version string
}

// Save writes the lab, which goes on running, to a file. What each cluster has stored is of one moment. What is on the disks of its nodes is of a
// moment later, as it is after a power cut: programs write on.
func (l *Lab) Save(ctx context.Context, to string, o SaveOptions) error {
	h, clusters, err := l.facts(ctx, o)
	if err != nil {
		return fmt.Errorf("save lab %s: %w", l.Name, err)
	}
	temp, err := os.MkdirTemp(l.dir(), ".save-")
	if err != nil {
		return fmt.Errorf("save lab %s: %w", l.Name, err)
	}
	defer os.RemoveAll(temp)
	reader, writer := io.Pipe()
	go func() { writer.CloseWithError(l.write(ctx, writer, h, clusters, temp)) }()
	err = durable.Write(to, reader, 0o600)
	reader.Close() // where the disk is full, the writer ends
	if err != nil {
		return fmt.Errorf("save lab %s: %w", l.Name, err)
	}
	return nil
}

// facts are what the lab is, and what its clusters have stored.
func (l *Lab) facts(ctx context.Context, o SaveOptions) (saved.Header, map[string]*saved.Cluster, error) {
	h := saved.Header{Lab: l.Lab, Taken: time.Now().UTC(), Kubernetes: l.Kit.Kubernetes, Fathom: o.Version, Secrets: o.Secrets, Periodic: o.Periodic}
	if err := l.Kit.Require(l.Kit.Bin("kube")); err != nil {
		return h, nil, err
	}
	h.Lab.Clusters = slices.Clone(l.Clusters)
	wires, err := l.Wires()
	if err != nil {
		return h, nil, err
	}
	for i := range h.Lab.Clusters {
		c := &h.Lab.Clusters[i]
		c.Nodes = slices.Clone(c.Nodes)
		for j := range c.Nodes {
			k := slices.IndexFunc(wires, func(w Wire) bool { return w.Node == c.Nodes[j].Name })
			if k < 0 || wires[k].State == "off" {
				continue
			}
			if wires[k].State == "cut" {
				h.Cut = append(h.Cut, wires[k].Node)
			}
			w := topology.Wire{Rate: wires[k].Rate, Delay: wires[k].Delay}
			if wires[k].Loss != "" {
				if w.Loss, err = topology.ParseLoss(wires[k].Loss); err != nil {
					return h, nil, err
				}
			}
			c.Nodes[j].Wire = w
		}
	}
	clusters := map[string]*saved.Cluster{}
	for i := range l.Clusters {
		c := &l.Clusters[i]
		if !l.built(c) {
			return h, nil, fmt.Errorf("cluster %s: %w; bring it up with `fathom up --name %s`", c.Name, errNoBuild, l.Name)
		}
		s, err := l.storedOf(ctx, c, o.Secrets)
		if err != nil {
			return h, nil, fmt.Errorf("cluster %s: %w", c.Name, err)
		}
		clusters[c.Name] = s
	}
	return h, clusters, nil
}

// storedOf asks the first control-plane node that answers for what the cluster has stored.
func (l *Lab) storedOf(ctx context.Context, c *topology.Cluster, secrets bool) (*saved.Cluster, error) {
	var state stored.State
	var problems []error
	for _, n := range c.ControlPlanes() {
		m, err := l.Machine(n.Name)
		if err == nil {
			state, err = l.etcdState(ctx, c, &n, m)
		}
		if err == nil {
			problems = nil
			break
		}
		problems = append(problems, err)
	}
	if err := errors.Join(problems...); err != nil {
		return nil, err
	}
	planes, public, err := l.planeDisks(c, func(name string) bool {
		return isPlanesOwn(name) || !isPlaneFile("/etc/kubernetes/"+name)
	})
	if err != nil {
		return nil, err
	}
	out := &saved.Cluster{Planes: planes, Public: public}
	if secrets {
		read := func(name string) ([]byte, error) {
			return os.ReadFile(l.diskFile(c.Nodes[0].Name, path.Join("/etc/kubernetes", name)))
		}
		keys, err := stored.ReadKeys(planes, read)
		if err != nil {
			return nil, err
		}
		if out.Keys, err = keys.Files(); err != nil {
			return nil, err
		}
	}
	out.State, err = saved.Keep(state, secrets)
	return out, err
}

// etcdState asks a control-plane node's etcd for all that it has.
func (l *Lab) etcdState(ctx context.Context, c *topology.Cluster, n *topology.Node, m *machine.Machine) (stored.State, error) {
	endpoint := "https://" + netip.AddrPortFrom(l.NodeAddrs(c, n)[0], 2379).String()
	out, err := m.Output(ctx, "kube", "etcd-state", "save", "--endpoint="+endpoint, "--cacert=/etc/kubernetes/pki/etcd/ca.crt",
		"--cert=/etc/kubernetes/pki/etcd/healthcheck-client.crt", "--key=/etc/kubernetes/pki/etcd/healthcheck-client.key")
	if err != nil {
		return stored.State{}, err
	}
	var state stored.State
	if err := json.Unmarshal([]byte(out), &state); err != nil {
		return stored.State{}, fmt.Errorf("read etcd's state: %w", err)
	}
	return state, nil
}

// planeDisks reads what the control-plane nodes have in /etc/kubernetes, and the certificates of the cluster's authorities.
func (l *Lab) planeDisks(c *topology.Cluster, leave func(name string) bool) (map[string]stored.Disk, map[string]string, error) {
	planes, public := map[string]stored.Disk{}, map[string]string{}
	for _, n := range c.ControlPlanes() {
		dir := os.DirFS(l.diskFile(n.Name, "/etc/kubernetes"))
		disk, err := stored.ReadDisk(dir, leave)
		if err != nil {
			return nil, nil, fmt.Errorf("read the disk of node %s: %w", n.Name, err)
		}
		planes[n.Name] = disk
		for _, cert := range disk.Certificates {
			if cert.Authority {
				text, err := os.ReadFile(l.diskFile(n.Name, "/etc/kubernetes/"+cert.Name+".crt"))
				if err != nil {
					return nil, nil, err
				}
				public[cert.Name] = string(text)
			}
		}
	}
	return planes, public, nil
}

// isPlanesOwn says whether a file of a control-plane node's /etc/kubernetes is one that the lab writes for each node itself.
func isPlanesOwn(name string) bool { return slices.Contains(writtenForNodes, "/etc/kubernetes/"+name) }

// isPlaneFile says whether a file is one of those that stored.Disk tells of.
func isPlaneFile(name string) bool {
	return strings.HasPrefix(name, "/etc/kubernetes/") && slices.Contains([]string{".crt", ".key", ".pub", ".conf", ".yaml"}, path.Ext(name))
}

// write writes the file. Images are exported into a directory first: an archive's members have their size in front.
func (l *Lab) write(ctx context.Context, to io.Writer, h saved.Header, clusters map[string]*saved.Cluster, temp string) error {
	w, err := saved.NewWriter(to, h, clusters)
	if err != nil {
		return err
	}
	for i := range l.Clusters {
		c := &l.Clusters[i]
		for j := range c.Nodes {
			n := &c.Nodes[j]
			own, err := l.nodeFiles(c, n)
			if err != nil {
				return err
			}
			leave := func(at string, read func() []byte) bool {
				if data, ours := own[at]; ours && slices.Equal(read(), data) {
					return true
				}
				return isLeft(n, at)
			}
			if err := w.AddDisk(n.Name, l.places(n.Name), h.Secrets, leave); err != nil {
				return err
			}
		}
	}
	if err := l.writeImages(ctx, w, temp); err != nil {
		return err
	}
	return w.Close()
}

// writeImages adds the images that nodes have beside those of the kit, each once.
func (l *Lab) writeImages(ctx context.Context, w *saved.Writer, temp string) error {
	type found struct {
		saved.Image
		from image.Target
	}
	images := map[string]*found{}
	var order []string
	for _, name := range l.nodeNames() {
		m, err := machine.Open(l.cgroup(name))
		if errors.Is(err, machine.ErrNotRunning) {
			continue // what it has, only its containerd can tell
		}
		if err != nil {
			return err
		}
		node := image.Target{Name: name, SocketPath: m.File(ContainerdSocket)}
		added, err := image.Added(ctx, l.Kit, node)
		if err != nil {
			return err
		}
		for _, i := range added {
			key := i.ID + strings.Join(i.Names, " ")
			if images[key] == nil {
				images[key] = &found{saved.Image{Names: i.Names}, node}
				order = append(order, key)
			}
			images[key].Nodes = append(images[key].Nodes, name)
		}
	}
	for n, key := range order {
		archive, err := os.Create(filepath.Join(temp, "image.tar"))
		if err != nil {
			return err
		}
		err = image.Export(ctx, l.Kit, images[key].from, images[key].Names, archive)
		if err == nil {
			_, err = archive.Seek(0, io.SeekStart)
		}
		if err == nil {
			err = w.AddImage(n, images[key].Image, archive)
		}
		if err := errors.Join(err, archive.Close()); err != nil {
			return err
		}
	}
	return nil
}

// ContainerdSocket is where a node's containerd listens.
const ContainerdSocket = "/run/containerd/containerd.sock"

// places are where the host has the parts of a node's disk.
func (l *Lab) places(node string) []saved.Place {
	s := machine.Spec{Dir: l.dir("nodes", node)}
	all := []saved.Place{{Node: "/", Host: filepath.Join(s.Dir, "upper")}, {Node: "/var", Host: filepath.Join(s.Dir, "var")}}
	for i, target := range overlaid {
		all = append(all, saved.Place{Node: target, Host: s.Upper(i)})
	}
	return all
}

// emptyDirs are the volumes of that kind, which are a pod's as long as its node has it. What they are called below a pod's directory,
// kubelet decides. https://kubernetes.io/docs/concepts/storage/volumes/#emptydir
const emptyDirs = "/var/lib/kubelet/pods/*/volumes/kubernetes.io~empty-dir"

// isLeft says whether a file of a node's disk is not saved: what programs make anew as they start, and what is the node's own.
func isLeft(n *topology.Node, at string) bool {
	if ok, _ := path.Match(emptyDirs, at); ok {
		return false
	}
	depth := strings.Count(at, "/")
	switch {
	case at == "/var/lib/kubelet", at == "/var/lib/kubelet/pods":
		return false
	case strings.HasPrefix(at, "/var/lib/kubelet/pods/"):
		// The directories on the way to volumes, and those below them.
		want := strings.Split(emptyDirs, "/")
		for i, part := range strings.Split(at, "/") {
			if i < len(want) && want[i] != "*" && want[i] != part {
				return true
			}
		}
		return false
	case strings.HasPrefix(at, "/var/lib/kubelet/"):
		return true
	case depth == 1:
		return slices.Contains([]string{"/proc", "/sys", "/dev", "/run", "/tmp"}, at)
	}
	for _, dir := range []string{"/var/log", "/var/run", "/var/lock", "/var/cache", "/var/tmp", "/var/lib/etcd", "/var/lib/containerd", "/var/lib/cni", "/etc/kubernetes/pki"} {
		if at == dir || strings.HasPrefix(at, dir+"/") {
			return true
		}
	}
	if n.Role == topology.ControlPlane && isPlaneFile(at) || at == "/etc/kubernetes/kubelet.conf" {
		return true
	}
	for _, m := range n.Mounts {
		if at == path.Clean(m.NodePath) {
			return true
		}
	}
	return slices.Contains([]string{machineID, "/etc/shadow", "/etc/gshadow", conflist.Path, "/opt/cni/bin/" + conflist.Plugin, mirrorProgram}, at) ||
		slices.Contains(secretFiles, strings.TrimPrefix(at, "/"))
}
