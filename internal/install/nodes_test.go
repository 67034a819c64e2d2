package install_test

import (
	"maps"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/fathom-network/fathom/internal/install"
)

func TestNodes(t *testing.T) {
	for _, tc := range []struct {
		nodes, want map[string]string
	}{
		{nil, map[string]string{"kubernetes.io/os": "linux"}},
		{map[string]string{"fathom.network/carries": "pods"}, map[string]string{"kubernetes.io/os": "linux", "fathom.network/carries": "pods"}},
	} {
		objects, err := install.Objects(install.Options{Nodes: tc.nodes})
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range objects {
			if o.GetKind() != "DaemonSet" {
				continue
			}
			got, _, err := unstructured.NestedStringMap(o.Object, "spec", "template", "spec", "nodeSelector")
			if err != nil || !maps.Equal(got, tc.want) {
				t.Errorf("with nodes %v agents run on %v (%v), want %v", tc.nodes, got, err, tc.want)
			}
		}
	}
}

func TestObjectsRefusesWhatIsWrong(t *testing.T) {
	for _, tc := range []struct {
		options install.Options
		want    string
	}{
		{install.Options{APIServer: "10.0.0.1"}, "want HOST:PORT"},
		{install.Options{APIServer: ":6443"}, "want HOST:PORT"},
		{install.Options{Config: map[string]string{"mode": "tunnel"}}, `mode: "tunnel"`},
	} {
		if _, err := install.Objects(tc.options); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%+v gives %v, want %q", tc.options, err, tc.want)
		}
	}
}
