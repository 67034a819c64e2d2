package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/internal/facts/apinode"
	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/kernel/machine"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// State tells in a word what the lab is, given how many of its nodes run.
func (l *Lab) State(running int) string {
	for i := range l.Clusters {
		if !l.built(&l.Clusters[i]) {
			return "unfinished"
		}
	}
	switch running {
	case len(l.nodeNames()):
		return "up"
	case 0:
		return "off"
	}
	return "partly up"
}

// ClusterStatus is what a cluster is found to be.
type ClusterStatus struct {
	Name      string       `json:"name"`
	State     string       `json:"state"` // ready, or what is wrong
	API       string       `json:"api"`
	Version   string       `json:"version,omitempty"`
	Network   string       `json:"network"`
	Proxy     string       `json:"proxy"`
	PodCIDR   string       `json:"podCIDR"`
	Service   string       `json:"serviceCIDR"`
	Nodes     []NodeStatus `json:"nodes"`
	PodsReady int          `json:"podsReady"`
	Pods      int          `json:"pods"`
}

// NodeStatus joins what the kernel and what Kubernetes say of a node.
type NodeStatus struct {
	NodeState
	Ready bool `json:"ready"`
}

// Status asks the kernel for the nodes and each cluster's API server for the rest. A cluster that does not
// answer within the time is told as such; that is no error.
func (l *Lab) Status(ctx context.Context, cluster string, wait time.Duration) ([]ClusterStatus, error) {
	var all []ClusterStatus
	for i := range l.Clusters {
		c := &l.Clusters[i]
		if cluster != "" && c.Name != cluster {
			continue
		}
		s := ClusterStatus{
			Name: c.Name, API: l.apiURL(c), Network: string(c.Network.Kind), Proxy: string(c.Proxy.Kind),
			PodCIDR: join(c.PodCIDRs), Service: join(c.ServiceCIDRs), State: "ready",
		}
		if c.Proxy.Mode != "" {
			s.Proxy += " (" + c.Proxy.Mode + ")"
		}
		nodes, err := l.Nodes(c.Name)
		if err != nil {
			return nil, err
		}
		for _, n := range nodes {
			s.Nodes = append(s.Nodes, NodeStatus{NodeState: n})
		}
		switch on := l.controlPlanesOn(c); {
		case !l.built(c):
			s.State = "unfinished"
		case on == 0:
			// Not asked: without the lab's wires its addresses may be somebody else's.
			s.State = "off"
		}
		if s.State != "ready" {
			all = append(all, s)
			continue
		}
		if err := withTimeout(ctx, wait, func(ctx context.Context) error { return l.askCluster(ctx, c, &s) }); err != nil {
			s.State = "API server does not answer: " + err.Error()
		}
		all = append(all, s)
	}
	if all == nil {
		_, err := l.Cluster(cluster)
		return nil, err
	}
	return all, nil
}

// controlPlanesOn counts the control-plane nodes that run.
func (l *Lab) controlPlanesOn(c *topology.Cluster) int {
	on := 0
	for _, n := range c.ControlPlanes() {
		if _, err := machine.Open(l.cgroup(n.Name)); err == nil {
			on++
		}
	}
	return on
}

func (l *Lab) askCluster(ctx context.Context, c *topology.Cluster, s *ClusterStatus) error {
	client, err := kube.Connect(l.AdminKubeconfig(c))
	if err != nil {
		return err
	}
	nodes, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	notReady := 0
	for i := range s.Nodes {
		for j := range nodes.Items {
			n := &nodes.Items[j]
			if n.Name == s.Nodes[i].Name {
				s.Nodes[i].Ready = apinode.Ready(n)
				s.Version = n.Status.NodeInfo.KubeletVersion
			}
		}
		if !s.Nodes[i].Ready {
			notReady++
		}
	}
	if notReady > 0 {
		s.State = fmt.Sprintf("%d of %d nodes are not Ready", notReady, len(s.Nodes))
	}
	pods, err := client.CoreV1().Pods("").List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	s.Pods = len(pods.Items)
	for i := range pods.Items {
		if podReady(&pods.Items[i]) {
			s.PodsReady++
		}
	}
	return nil
}

// LogFile returns the file that a program of a node logs to: containerd, kubelet, mirror, init, or the newest
// container of that name. Logs can be read while the node is off.
func (l *Lab) LogFile(node, program string) (string, error) {
	if _, _, err := l.Node(node); err != nil {
		return "", err
	}
	if program == "init" {
		return l.dir("nodes", node, "init.log"), nil
	}
	logs := l.diskFile(node, "/var/log")
	have := []string{"init"}
	for _, name := range []string{containerdService, kubeletService, mirrorService} {
		path := filepath.Join(logs, name+".log")
		if _, err := os.Stat(path); err != nil {
			continue
		}
		if program == name {
			return path, nil
		}
		have = append(have, name)
	}
	// /var/log/pods/NAMESPACE_POD_UID/CONTAINER/RESTARTS.log
	files, err := filepath.Glob(filepath.Join(logs, "pods", "*", "*", "*.log"))
	if err != nil {
		return "", err
	}
	var newest string
	var when time.Time
	for _, file := range files {
		dir := filepath.Dir(file)
		container := filepath.Base(dir)
		pod := strings.Split(filepath.Base(filepath.Dir(dir)), "_")
		have = append(have, container)
		if container != program && (len(pod) < 2 || pod[1] != program) {
			continue
		}
		info, err := os.Stat(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", err
		}
		if info.ModTime().After(when) {
			newest, when = file, info.ModTime()
		}
	}
	if newest == "" {
		slices.Sort(have)
		return "", &NotFoundError{Kind: "log of", Name: program, Have: slices.Compact(have), Hint: "on node " + node}
	}
	return newest, nil
}
