package install_test

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/fathom-network/fathom/deploy"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/install"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

func find(t *testing.T, objects []*unstructured.Unstructured, kind string) *unstructured.Unstructured {
	t.Helper()
	for _, o := range objects {
		if o.GetKind() == kind {
			return o
		}
	}
	t.Fatalf("there is no %s", kind)
	return nil
}

func agent(t *testing.T, objects []*unstructured.Unstructured) map[string]any {
	t.Helper()
	containers, _, err := unstructured.NestedSlice(find(t, objects, "DaemonSet").Object, "spec", "template", "spec", "containers")
	if err != nil || len(containers) != 1 {
		t.Fatalf("%v, %v", containers, err)
	}
	return containers[0].(map[string]any)
}

func TestObjects(t *testing.T) {
	objects, err := install.Objects(install.Options{Image: "registry.example/agent:v1", APIServer: "[fd00::2]:6443", Config: map[string]string{"mode": "direct", "mtu": "1400"}})
	if err != nil {
		t.Fatal(err)
	}
	data, _, err := unstructured.NestedStringMap(find(t, objects, "ConfigMap").Object, "data")
	if err != nil || data["mode"] != "direct" || data["mtu"] != "1400" {
		t.Errorf("settings %v, %v", data, err)
	}
	a := agent(t, objects)
	if a["image"] != "registry.example/agent:v1" {
		t.Errorf("image %v", a["image"])
	}
	env := map[string]any{}
	for _, e := range a["env"].([]any) {
		env[e.(map[string]any)["name"].(string)] = e.(map[string]any)["value"]
	}
	if env["KUBERNETES_SERVICE_HOST"] != "fd00::2" || env["KUBERNETES_SERVICE_PORT"] != "6443" {
		t.Errorf("environment %v", env)
	}
	text, err := install.YAML(objects)
	if err != nil {
		t.Fatal(err)
	}
	again, err := kube.Decode(bytes.NewReader(text))
	if err != nil || len(again) != len(objects) {
		t.Errorf("%d objects of %d can be read again: %v", len(again), len(objects), err)
	}
}

// What is in the repository can be applied as it is: what refers to another thing in it does so rightly.
func TestManifests(t *testing.T) {
	objects, err := install.Objects(install.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if got := agent(t, objects)["image"]; got != deploy.Image {
		t.Errorf("the image is %v, and deploy.Image %s", got, deploy.Image)
	}
	if c := find(t, objects, "ConfigMap"); c.GetName() != netconf.ConfigMap || c.GetNamespace() != netconf.Namespace {
		t.Errorf("the configuration is in %s/%s", c.GetNamespace(), c.GetName())
	}
	selector, _, _ := unstructured.NestedStringMap(find(t, objects, "DaemonSet").Object, "spec", "selector", "matchLabels")
	key, value, _ := strings.Cut(netconf.AgentSelector, "=")
	if selector[key] != value {
		t.Errorf("the agents have %v, and are looked for by %s", selector, netconf.AgentSelector)
	}
	for _, o := range objects {
		if strings.HasPrefix(o.GetKind(), "Cluster") || strings.HasPrefix(o.GetKind(), "ValidatingAdmission") || o.GetKind() == "Namespace" || o.GetKind() == "CustomResourceDefinition" {
			continue
		}
		if o.GetNamespace() == "default" && strings.HasPrefix(o.GetKind(), "Role") && o.GetName() == "fathom-controller" {
			continue // for the one object that says where the API servers are
		}
		if o.GetNamespace() != netconf.Namespace {
			t.Errorf("%s %s is in namespace %q", o.GetKind(), o.GetName(), o.GetNamespace())
		}
	}
}

// TestAuthenticatedMetrics has the right to ask about tokens given out only where it is needed.
func TestAuthenticatedMetrics(t *testing.T) {
	for _, wanted := range []bool{false, true} {
		objects, err := install.Objects(install.Options{AuthenticatedMetrics: wanted})
		if err != nil {
			t.Fatal(err)
		}
		given := 0
		for _, o := range objects {
			if role, _, _ := unstructured.NestedString(o.Object, "roleRef", "name"); role == "system:auth-delegator" {
				given++
			}
			if o.GetKind() != "DaemonSet" && o.GetKind() != "Deployment" {
				continue
			}
			containers, _, _ := unstructured.NestedSlice(o.Object, "spec", "template", "spec", "containers")
			args, _, _ := unstructured.NestedStringSlice(containers[0].(map[string]any), "args")
			if has := slices.Contains(args, "--metrics-access=authenticated"); has != wanted {
				t.Errorf("%s %s is started with %v", o.GetKind(), o.GetName(), args)
			}
		}
		if (given == 1) != wanted || given > 1 {
			t.Errorf("asked for: %t; %d bindings to system:auth-delegator", wanted, given)
		}
	}
}

func TestDNS(t *testing.T) {
	objects, err := install.Objects(install.Options{
		DNSImage: "registry.example/dns:1", DNSConfig: "rke2-coredns", APIServer: "10.0.0.1:6443", Nodes: map[string]string{"a": "b"},
		Config: map[string]string{"dns": "node-cache", "serviceProxy": "auto"},
	})
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]*unstructured.Unstructured{}
	for _, o := range objects {
		if o.GetNamespace() == "kube-system" {
			found[o.GetKind()] = o
		}
	}
	if len(found) != 2 || found["Service"].GetName() != "kube-dns-upstream" {
		t.Fatalf("the objects in kube-system are %v", found)
	}
	containers, _, _ := unstructured.NestedSlice(found["DaemonSet"].Object, "spec", "template", "spec", "containers")
	if c := containers[0].(map[string]any); c["image"] != "registry.example/dns:1" || strings.Contains(fmt.Sprint(c["env"]), "KUBERNETES_SERVICE") { // it asks no API server
		t.Errorf("the container is %v", c)
	}
	if nodes, _, _ := unstructured.NestedStringMap(found["DaemonSet"].Object, "spec", "template", "spec", "nodeSelector"); nodes["a"] != "b" {
		t.Errorf("it runs on nodes %v", nodes)
	}
	volumes, _, _ := unstructured.NestedSlice(found["DaemonSet"].Object, "spec", "template", "spec", "volumes")
	if got := fmt.Sprint(volumes); !strings.Contains(got, "rke2-coredns") || !strings.Contains(got, "coredns-custom") || strings.Contains(got, "name:coredns ") {
		t.Errorf("it finds CoreDNS's configuration in %s", got)
	}
}

// TestMemory has every program's memory bounded, by the manifests and by settings, and Go told of three quarters of it.
func TestMemory(t *testing.T) {
	settings := map[string]string{"dns": "node-cache", "serviceProxy": "auto"}
	raised := maps.Clone(settings)
	maps.Copy(raised, map[string]string{"agentMemory": "2Gi", "controllerMemory": "1G", "dnsMemory": "300Mi"})
	for name, tt := range map[string]struct {
		config map[string]string
		want   map[string]string
	}{
		"the manifests": {settings, map[string]string{"fathom-agent": "512Mi", "fathom-controller": "256Mi", "fathom-dns": "192Mi"}},
		"settings":      {raised, map[string]string{"fathom-agent": "2Gi", "fathom-controller": "1G", "fathom-dns": "300Mi"}},
	} {
		objects, err := install.Objects(install.Options{Config: tt.config, APIServer: "10.0.0.1:6443"})
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]string{}
		for _, o := range objects {
			if o.GetKind() != "DaemonSet" && o.GetKind() != "Deployment" {
				continue
			}
			var pods corev1.PodTemplateSpec
			template, _, _ := unstructured.NestedMap(o.Object, "spec", "template")
			if err := runtime.DefaultUnstructuredConverter.FromUnstructured(template, &pods); err != nil {
				t.Fatal(err)
			}
			c := pods.Spec.Containers[0]
			limit := c.Resources.Limits[corev1.ResourceMemory]
			got[o.GetName()] = limit.String()
			if request := c.Resources.Requests[corev1.ResourceMemory]; request.IsZero() || request.Cmp(limit) > 0 {
				t.Errorf("%s: %s requests %s of %s", name, o.GetName(), &request, &limit)
			}
			var told []string
			for _, e := range c.Env {
				if e.Name == "GOMEMLIMIT" {
					told = append(told, e.Value)
				}
			}
			if len(told) != 1 {
				t.Errorf("%s: %s has GOMEMLIMIT %v, want it once", name, o.GetName(), told)
				continue
			}
			// Go writes MiB where Kubernetes writes Mi.
			if go75 := resource.MustParse(strings.TrimSuffix(told[0], "B")); go75.Value() != limit.Value()*3/4 {
				t.Errorf("%s: %s has GOMEMLIMIT %s of %s", name, o.GetName(), told[0], &limit)
			}
		}
		if !maps.Equal(got, tt.want) {
			t.Errorf("%s: limits %v, want %v", name, got, tt.want)
		}
	}
}

func TestObjectsRefuses(t *testing.T) {
	for name, o := range map[string]install.Options{
		"a setting that is wrong":       {Config: map[string]string{"mode": "overlay"}},
		"an address without a port":     {APIServer: "10.0.0.1"},
		"an address without a host":     {APIServer: ":6443"},
		"a port that is none":           {APIServer: "10.0.0.1:https"},
		"less memory than it starts in": {Config: map[string]string{"agentMemory": "8Mi"}},
		"a setting that does not exist": {Config: map[string]string{"nodes": "3"}},
	} {
		if _, err := install.Objects(o); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
}
