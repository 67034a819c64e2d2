// Package install installs the network on a cluster: it applies the manifests of deploy with an installation's choices. The
// lab and `fathom install` both use it.
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

// Owner is the field manager of the installed objects.
const Owner = "fathom-install"

// Options are the choices of an installation. The zero value is deploy/fathom.yaml as it is.
type Options struct {
	Image    string // of the agent and the controller
	DNSImage string // of the DNS cache on nodes, if the setting dns enables it
	// DNSConfig is the ConfigMap of kube-system with CoreDNS's Corefile; empty means coredns.
	DNSConfig string
	// APIServer is the address, HOST:PORT, at which agents and the controller reach the API server. Empty means the Service
	// kubernetes, which works once a Service proxy runs on the node.
	APIServer string
	// AuthenticatedMetrics makes agents and the controller serve metrics over TLS only, and only to tokens whose user may
	// get /metrics.
	AuthenticatedMetrics bool
	// Nodes are labels that select the nodes which get the network; empty selects every node. It serves to replace another
	// network node by node.
	Nodes map[string]string
	// Config are settings of the ConfigMap fathom-config, see package netconf.
	Config map[string]string
}

// Objects returns the objects to install, in the order in which they should be created.
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

// dnsObjects returns the objects of the DNS cache on nodes.
func dnsObjects() ([]*unstructured.Unstructured, error) {
	return kube.Decode(bytes.NewReader(deploy.DNS))
}

// setCorefile makes the pods of the DNS cache read CoreDNS's configuration from a ConfigMap.
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

// podSettings are an installation's choices for the pods of a DaemonSet or a Deployment with one container. Empty fields
// leave the manifests' values.
type podSettings struct {
	nodes     map[string]string // labels of nodes
	image     string
	env, args []any
	memory    int64 // the limit, in bytes
}

// goMemory is the percentage of a container's memory that Go is told to stay below (GOMEMLIMIT). The rest is for kernel
// memory that is charged to the container: sockets, eBPF maps and nftables sets. The manifests have the same percentage.
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
		return fmt.Errorf("%s %s does not have exactly one container", object.GetKind(), object.GetName())
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

// merge adds objects to a list field of an object. One of the same name is replaced.
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

// tokenReviewers lets agents and the controller review tokens and access. It is not in the manifests: only authenticated
// metrics need it.
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

// YAML encodes objects for `kubectl apply -f`.
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

// Apply installs the network or changes an installation. Existing settings that o does not name are kept.
func Apply(ctx context.Context, client *kube.Client, o Options) error {
	if err := waitGone(ctx, client); err != nil { // after an interrupted removal
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
	// By now the agents no longer direct DNS to the cache, or they stop doing so when it ends.
	cache, err := dnsObjects()
	if err != nil {
		return err
	}
	return client.Delete(ctx, cache)
}

// CreatePods creates the agents' pods on nodes of a cluster whose controllers have not started. They wait for the roles
// that the API server creates a second or more after it serves, which an agent does not need. ca are the certificates by
// which service accounts trust the API server. If ctx ends before all pods exist, the controllers create the rest.
func CreatePods(ctx context.Context, client *kube.Client, nodes []string, ca string) error {
	// It is part of every service account's volume. A controller would create it in each namespace, too.
	roots := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "kube-root-ca.crt"}, Data: map[string]string{"ca.crt": ca}}
	_, err := client.CoreV1().ConfigMaps(netconf.Namespace).Create(ctx, roots, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("create ConfigMap %s/%s: %w", netconf.Namespace, roots.Name, err)
	}
	return client.CreateDaemonPods(ctx, netconf.Namespace, daemonSet, nodes)
}
