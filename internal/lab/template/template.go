// Package template has what is the same for all clusters of one description, so that a cluster need not be made the long way
// each time: the objects that its API server holds when everything answers, and the files of its control plane. What a cluster
// has for itself alone (addresses, keys and certificates, UIDs, times) is not in a template. It is made anew, and put in.
//
// The package turns values into values: it asks no cluster and makes no file.
package template

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"time"

	"github.com/klauspost/compress/zstd"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/internal/lab/stored"
)

// Template is a cluster as it is when everything answers, without what is its own.
type Template struct {
	// Underlay4 and Underlay6 are the ranges that the nodes' addresses in it are of.
	Underlay4, Underlay6 netip.Prefix
	Objects              stored.State
	// Nodes are what the Nodes' metadata tell of their making. The rest of them the lab knows.
	Nodes map[string]metav1.ObjectMeta
	// Planes are the disks of the control-plane nodes, by the nodes' names.
	Planes map[string]stored.Disk
	// CoreDNS is the manifest of its Deployment, which is none of the Objects.
	CoreDNS []byte
}

// format is raised when templates begin to look different for the same cluster.
const format = 2

// Key is the same for clusters that one template serves: of the same programs, and described the same.
func Key(programs string, description any) (string, error) {
	data, err := json.Marshal(description)
	if err != nil {
		return "", fmt.Errorf("tell which template a cluster has: %w", err)
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%d\n%s\n%s", format, programs, data))
	return hex.EncodeToString(sum[:12]), nil
}

// New makes a template of a cluster's state, and of the disks of its control-plane nodes.
func New(state stored.State, id stored.Identity, planes map[string]stored.Disk, coreDNS []byte) (*Template, error) {
	objects, nodes, err := Generalize(state, id)
	if err != nil {
		return nil, fmt.Errorf("make a template: %w", err)
	}
	return &Template{Underlay4: id.Underlay4, Underlay6: id.Underlay6, Objects: objects, Nodes: nodes, Planes: planes, CoreDNS: coreDNS}, nil
}

// Cluster is a new cluster: what its etcd and its control-plane nodes begin with.
type Cluster struct {
	State stored.State
	Files map[string]map[string][]byte // by node and name, relative to /etc/kubernetes
}

// Cluster makes a new cluster of the template, with keys of its own. The Nodes are those of the template, as its API server
// should have them.
func (t *Template) Cluster(underlay4, underlay6 netip.Prefix, nodes []*corev1.Node, now time.Time) (*Cluster, error) {
	keys, err := stored.NewKeys(t.Planes)
	if err != nil {
		return nil, fmt.Errorf("make a cluster of a template: %w", err)
	}
	from := stored.Identity{Underlay4: t.Underlay4, Underlay6: t.Underlay6}
	to := stored.Identity{Underlay4: underlay4, Underlay6: underlay6, Public: keys.Public()}
	c := &Cluster{Files: map[string]map[string][]byte{}}
	if c.State, err = Personalize(t.Objects, from, to, t.Nodes, nodes, now); err != nil {
		return nil, fmt.Errorf("make a cluster of a template: %w", err)
	}
	for name, disk := range t.Planes {
		if c.Files[name], err = disk.Personalize(from, to, keys); err != nil {
			return nil, fmt.Errorf("make a cluster of a template: node %s: %w", name, err)
		}
	}
	return c, nil
}

// Encode returns the template as a file has it.
func (t *Template) Encode() ([]byte, error) {
	var out bytes.Buffer
	w, err := zstd.NewWriter(&out, zstd.WithEncoderCRC(true))
	if err != nil {
		return nil, err
	}
	if err := errors.Join(json.NewEncoder(w).Encode(t), w.Close()); err != nil {
		return nil, fmt.Errorf("write a template: %w", err)
	}
	return out.Bytes(), nil
}

// maxSize bounds what a file may unpack to, in bytes.
const maxSize = 64 << 20

// Decode reads a file. One that was cut or changed is an error.
func Decode(data []byte) (*Template, error) {
	r, err := zstd.NewReader(bytes.NewReader(data), zstd.WithDecoderMaxMemory(maxSize), zstd.WithDecoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	defer r.Close()
	text, err := io.ReadAll(io.LimitReader(r, maxSize))
	if err != nil {
		return nil, fmt.Errorf("read a template: %w", err)
	}
	var t Template
	if err := json.Unmarshal(text, &t); err != nil {
		return nil, fmt.Errorf("read a template: %w", err)
	}
	return &t, nil
}
