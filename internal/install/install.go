// Package install puts the network on a cluster: the manifests of deploy, with what an installation chooses
// filled in. The lab and `fathom install` do the same thing with it.
package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"strconv"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	"github.com/fathom-network/fathom/deploy"
	"github.com/fathom-network/fathom/internal/kube"
	"github.com/fathom-network/fathom/internal/netconf"
)

// Owner is the field manager of what is installed.
const Owner = "fathom-install"

// Options are what an installation chooses. The zero value is deploy/fathom.yaml as it is.
type Options struct {
	Image string // of the agent
	// APIServer is the address, HOST:PORT, at which agents reach the API server. Empty is the Service
	// kubernetes, which works once a Service proxy runs on the node.
	APIServer string
	// Nodes are labels of the nodes that get the network; empty is every node. Another network is replaced node by
	// node with it.
	Nodes map[string]string
	// Config are settings of the ConfigMap fathom-config, see package netconf.
	Config map[string]string
}

// Objects returns what is to be installed, in the order in which it should be made.
func Objects(o Options) ([]*unstructured.Unstructured, error) {
	if _, err := netconf.Parse(o.Config); err != nil {
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
	for _, object := range objects {
		switch object.GetKind() {
		case "ConfigMap":
			for key, value := range o.Config {
				if err := unstructured.SetNestedField(object.Object, value, "data", key); err != nil {
					return nil, err
				}
			}
		case "DaemonSet":
			if err := setAgent(object, o, env); err != nil {
				return nil, fmt.Errorf("deploy/fathom.yaml: %w", err)
			}
		}
	}
	return objects, nil
}

// setAgent changes where agents run, and their container.
func setAgent(daemonSet *unstructured.Unstructured, o Options, env []any) error {
	for label, value := range o.Nodes {
		if err := unstructured.SetNestedField(daemonSet.Object, value, "spec", "template", "spec", "nodeSelector", label); err != nil {
			return err
		}
	}
	path := []string{"spec", "template", "spec", "containers"}
	containers, _, err := unstructured.NestedSlice(daemonSet.Object, path...)
	if err != nil {
		return err
	}
	if len(containers) != 1 {
		return errors.New("the DaemonSet has not one container")
	}
	agent := containers[0].(map[string]any)
	if o.Image != "" {
		agent["image"] = o.Image
	}
	have, _, err := unstructured.NestedSlice(agent, "env")
	if err != nil {
		return err
	}
	agent["env"] = append(have, env...)
	return unstructured.SetNestedSlice(daemonSet.Object, containers, path...)
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
	return client.Apply(ctx, Owner, objects)
}
