// Package install puts the network on a cluster: the manifests of deploy, with what an installation chooses
// filled in. The lab and `fathom install` do the same thing with it.
package install

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	"github.com/fathom-network/fathom/deploy"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// Owner is the field manager of what is installed.
const Owner = "fathom-install"

// Options are what an installation chooses. The zero value is deploy/fathom.yaml as it is.
type Options struct {
	Image    string // of the agent and the controller
	DNSImage string // of the DNS cache on nodes, if the setting dns asks for it
	// DNSConfig is the ConfigMap of kube-system in which CoreDNS has its Corefile; empty is coredns.
	DNSConfig string
	// APIServer is the address, HOST:PORT, at which agents and the controller reach the API server. Empty is the Service
	// kubernetes, which works once a Service proxy runs on the node.
	APIServer string
	// AuthenticatedMetrics has agents and the controller answer scrapes by TLS alone, and to tokens whose user may get
	// /metrics.
	AuthenticatedMetrics bool
	// Nodes are labels of the nodes that get the network; empty is every node. Another network is replaced node by
	// node with it.
	Nodes map[string]string
	// Config are settings of the ConfigMap fathom-config, see package netconf.
	Config map[string]string
}

// Objects returns what is to be installed, in the order in which it should be made.
func Objects(o Options) ([]*unstructured.Unstructured, error) {
	config, err := netconf.Parse(o.Config)
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	var env []any
	if o.APIServer != "" {
		host, port, err := net.SplitHostPort(o.APIServer)
		if err == nil {
			_, err = strconv.ParseUint(port, 10, 16)
		}
		if err != nil || host == "" {
			return nil, fmt.Errorf("address of the API server %q: want HOST:PORT", o.APIServer)
		}
		env = []any{
			map[string]any{"name": "KUBERNETES_SERVICE_HOST", "value": host},
			map[string]any{"name": "KUBERNETES_SERVICE_PORT", "value": port},
		}
	}
	objects, err := kube.Decode(bytes.NewReader(deploy.Manifests()))
	if err != nil {
		return nil, err
	}
	if config.DNS == netconf.DNSNodeCache {
		cache, err := dnsObjects()
		if err != nil {
			return nil, err
		}
		objects = append(objects, cache...)
	}
	var args []any
	if o.AuthenticatedMetrics {
		args = append(args, "--metrics-access=authenticated")
		objects = append(objects, tokenReviewers())
	}
	for _, object := range objects {
		switch object.GetKind() {
		case "ConfigMap":
			for key, value := range o.Config {
				if err := unstructured.SetNestedField(object.Object, value, "data", key); err != nil {
					return nil, err
				}
			}
		case "DaemonSet":
			set := podSettings{o.Nodes, o.Image, env, args, config.AgentMemory}
			if object.GetName() != daemonSet {
				set = podSettings{nodes: o.Nodes, image: o.DNSImage, memory: config.DNSMemory}
				if err := setCorefile(object, o.DNSConfig); err != nil {
					return nil, err
				}
			}
			if err := set.apply(object); err != nil {
				return nil, fmt.Errorf("DaemonSet %s of deploy: %w", object.GetName(), err)
			}
		case "Deployment":
			if err := (podSettings{nil, o.Image, env, args, config.ControllerMemory}).apply(object); err != nil {
				return nil, fmt.Errorf("%s of deploy/fathom.yaml: %w", object.GetName(), err)
			}
		}
	}
	return objects, nil
}

// dnsObjects are those of the DNS cache on nodes.
func dnsObjects() ([]*unstructured.Unstructured, error) {
	return kube.Decode(bytes.NewReader(deploy.DNS))
}

// setCorefile has the pods of the DNS cache find CoreDNS's configuration in a ConfigMap.
func setCorefile(object *unstructured.Unstructured, configMap string) error {
	if configMap == "" {
		return nil
	}
	path := []string{"spec", "template", "spec", "volumes"}
	volumes, _, err := unstructured.NestedSlice(object.Object, path...)
	if err != nil {
		return err
	}
	for _, v := range volumes {
		if v := v.(map[string]any); v["name"] == "corefile" {
			v["configMap"] = map[string]any{"name": configMap}
		}
	}
	return unstructured.SetNestedSlice(object.Object, volumes, path...)
}

// podSettings are what an installation chooses for the pods of a DaemonSet or a Deployment, which have one container. What
// is empty stays as the manifests have it.
type podSettings struct {
	nodes     map[string]string // labels of nodes
	image     string
	env, args []any
	memory    int64 // the limit, in bytes
}

// goMemory is the part of a container's memory, in percent, that Go is told to stay below (GOMEMLIMIT). The rest is the
// kernel's that is charged to the container: sockets, maps of eBPF and sets of nftables. The manifests have the same part.
const goMemory = 75

func (s podSettings) apply(object *unstructured.Unstructured) error {
	for label, value := range s.nodes {
		if err := unstructured.SetNestedField(object.Object, value, "spec", "template", "spec", "nodeSelector", label); err != nil {
			return err
		}
	}
	path := []string{"spec", "template", "spec", "containers"}
	containers, _, err := unstructured.NestedSlice(object.Object, path...)
	if err != nil {
		return err
	}
	if len(containers) != 1 {
		return fmt.Errorf("%s %s has not one container", object.GetKind(), object.GetName())
	}
	container := containers[0].(map[string]any)
	if s.image != "" {
		container["image"] = s.image
	}
	env := s.env
	if s.memory > 0 {
		limit := resource.NewQuantity(s.memory, resource.BinarySI).String()
		if err := unstructured.SetNestedField(container, limit, "resources", "limits", "memory"); err != nil {
			return err
		}
		env = append(slices.Clip(env), map[string]any{"name": "GOMEMLIMIT", "value": strconv.FormatInt(s.memory*goMemory/100, 10)})
	}
	if err := merge(container, "env", env); err != nil {
		return err
	}
	if len(s.args) > 0 {
		have, _, err := unstructured.NestedSlice(container, "args")
		if err != nil {
			return err
		}
		container["args"] = append(have, s.args...)
	}
	return unstructured.SetNestedSlice(object.Object, containers, path...)
}

// merge puts objects into a list of objects, each in the place of the one that has its name.
func merge(object map[string]any, field string, add []any) error {
	list, _, err := unstructured.NestedSlice(object, field)
	if err != nil || len(add) == 0 {
		return err
	}
	name := func(x any) any { return x.(map[string]any)["name"] }
	for _, a := range add {
		list = slices.DeleteFunc(list, func(have any) bool { return name(have) == name(a) })
		list = append(list, a)
	}
	object[field] = list
	return nil
}

// tokenReviewers lets agents and the controller ask whose a token is and what its user may. It is no part of the manifests:
// without authenticated metrics nobody needs it.
func tokenReviewers() *unstructured.Unstructured {
	subject := func(name string) any {
		return map[string]any{"kind": "ServiceAccount", "name": name, "namespace": netconf.Namespace}
	}
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
		"metadata": map[string]any{"name": "fathom-metrics-token-reviewers", "labels": map[string]any{"app.kubernetes.io/part-of": "fathom"}},
		"roleRef":  map[string]any{"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:auth-delegator"},
		"subjects": []any{subject("fathom-agent"), subject("fathom-controller")},
	}}
}

// YAML writes objects as `kubectl apply -f` takes them.
func YAML(objects []*unstructured.Unstructured) ([]byte, error) {
	var b bytes.Buffer
	for _, o := range objects {
		doc, err := yaml.Marshal(o.Object)
		if err != nil {
			return nil, err
		}
		b.WriteString("---\n")
		b.Write(doc)
	}
	return b.Bytes(), nil
}

// Apply installs the network, or changes an installation: settings that are there and that o does not name stay.
func Apply(ctx context.Context, client *kube.Client, o Options) error {
	if err := waitGone(ctx, client); err != nil { // of an uninstallation that was interrupted
		return err
	}
	have, err := client.CoreV1().ConfigMaps(netconf.Namespace).Get(ctx, netconf.ConfigMap, metav1.GetOptions{})
	switch {
	case err == nil:
		config := maps.Clone(have.Data)
		maps.Copy(config, o.Config)
		o.Config = config
	case !apierrors.IsNotFound(err):
		return fmt.Errorf("look for an installation: %w", err)
	}
	objects, err := Objects(o)
	if err != nil {
		return err
	}
	if err := client.Apply(ctx, Owner, objects); err != nil {
		return err
	}
	if o.Config["dns"] == string(netconf.DNSNodeCache) {
		return nil
	}
	// The agents lead nobody to it any more, or do so no longer when it ends.
	cache, err := dnsObjects()
	if err != nil {
		return err
	}
	return client.Delete(ctx, cache)
}

// CreatePods makes the agents' pods on nodes of a cluster whose controllers have yet to begin: they wait for the roles that
// the API server makes, a second and more after it serves, and an agent needs none of those. ca are the certificates that
// service accounts trust the API server by. What is not there when ctx ends, the controllers make.
func CreatePods(ctx context.Context, client *kube.Client, nodes []string, ca string) error {
	// A part of every service account's volume, which a controller makes in each namespace, too.
	roots := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "kube-root-ca.crt"}, Data: map[string]string{"ca.crt": ca}}
	_, err := client.CoreV1().ConfigMaps(netconf.Namespace).Create(ctx, roots, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("create ConfigMap %s/%s: %w", netconf.Namespace, roots.Name, err)
	}
	return client.CreateDaemonPods(ctx, netconf.Namespace, daemonSet, nodes)
}
