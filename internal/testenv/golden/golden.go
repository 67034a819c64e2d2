// Package golden runs tests whose inputs and outputs are files: NAME.in.yaml are objects of the API as one writes them, and
// NAME.out.txt is what is made of them. `go test -update` writes the latter anew; what it changed is read in the diff.
package golden

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/manifest"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// Objects are the objects of a file, by kind, in the order in which they are written.
type Objects struct {
	ConfigMaps      []*corev1.ConfigMap
	Nodes           []*corev1.Node
	Namespaces      []*corev1.Namespace
	Pods            []*corev1.Pod
	Services        []*corev1.Service
	EndpointSlices  []*discoveryv1.EndpointSlice
	ServiceCIDRs    []*networkingv1.ServiceCIDR
	NetworkPolicies []*networkingv1.NetworkPolicy
	AddressPools    []*v1alpha1.AddressPool
	IPPools         []*v1alpha1.IPPool
	IPBlocks        []*v1alpha1.IPBlock
}

// Run runs a test for each NAME.in.yaml of the folder testdata and compares what render returns with NAME.out.txt. There is at
// least one.
func Run(t *testing.T, render func(Objects) string) {
	t.Helper()
	inputs, err := filepath.Glob("testdata/*.in.yaml")
	if err != nil || len(inputs) == 0 {
		t.Fatalf("no testdata/*.in.yaml: %v", err)
	}
	used := map[string]bool{}
	for _, in := range inputs {
		name := strings.TrimSuffix(in, ".in.yaml")
		out := name + ".out.txt"
		used[out] = true
		t.Run(filepath.Base(name), func(t *testing.T) { Compare(t, render(read(t, in)), out) })
	}
	outputs, err := filepath.Glob("testdata/*.out.txt")
	if err != nil {
		t.Fatal(err)
	}
	for _, out := range outputs {
		if !used[out] {
			t.Errorf("%s is of no test: there is no input of that name", out)
		}
	}
}

// Compare compares a text with the golden file at path.
func Compare(t *testing.T, got, path string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%v: -update writes it", err)
	}
	if got != string(want) {
		t.Errorf("got:\n%s\nwant (%s; -update rewrites it):\n%s", got, path, want)
	}
}

// read reads a file of objects. A kind that no test takes and a field that the kind does not have are errors: nothing of an
// input is without effect by mistake.
func read(t *testing.T, path string) (all Objects) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	objects, problems := manifest.Parse(data, path)
	for _, p := range problems {
		t.Fatalf("%s: %s", path, p)
	}
	for _, o := range objects {
		if err := all.add(o); err != nil {
			t.Fatalf("%s: %v", o, err)
		}
	}
	return all
}

func (all *Objects) add(o manifest.Object) error {
	switch o.GetKind() {
	case "ConfigMap":
		return add(&all.ConfigMaps, o)
	case "Node":
		return add(&all.Nodes, o)
	case "Namespace":
		return add(&all.Namespaces, o)
	case "Pod":
		return add(&all.Pods, o)
	case "Service":
		return add(&all.Services, o)
	case "EndpointSlice":
		return add(&all.EndpointSlices, o)
	case "ServiceCIDR":
		return add(&all.ServiceCIDRs, o)
	case "NetworkPolicy":
		return add(&all.NetworkPolicies, o)
	case "AddressPool":
		return add(&all.AddressPools, o)
	case "IPPool":
		return add(&all.IPPools, o)
	case "IPBlock":
		return add(&all.IPBlocks, o)
	}
	return fmt.Errorf("no test takes objects of this kind")
}

func add[T any, P interface {
	*T
	metav1.Object
}](to *[]*T, o manifest.Object) error {
	var typed T
	if err := runtime.DefaultUnstructuredConverter.FromUnstructuredWithValidation(o.Object, &typed, true); err != nil {
		return err
	}
	P(&typed).SetUID(types.UID(o.GetKind() + " " + o.GetName())) // no manifest has one, and objects are told apart by it
	*to = append(*to, &typed)
	return nil
}
