package install

import (
	"bytes"
	"slices"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/fathom-network/fathom/deploy"
	"github.com/fathom-network/fathom/internal/facts/ippool"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// TestDeletePools: no finalizer of ours keeps a pool, whether there are blocks or not, and no controller runs.
func TestDeletePools(t *testing.T) {
	client, err := kube.Connect(testenv.APIServer(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := deletePools(t.Context(), client); err != nil {
		t.Error("without the kinds:", err)
	}
	objects, err := kube.Decode(bytes.NewReader(deploy.Manifests()))
	if err != nil {
		t.Fatal(err)
	}
	objects = slices.DeleteFunc(objects, func(o *unstructured.Unstructured) bool { return o.GetKind() != "CustomResourceDefinition" })
	more, err := kube.Decode(bytes.NewReader([]byte(`
{apiVersion: fathom.network/v1alpha1, kind: IPPool, metadata: {name: p, finalizers: [` + ippool.Finalizer + `]}, spec: {ipv4: {cidr: 10.50.0.0/16}}}
---
{apiVersion: fathom.network/v1alpha1, kind: IPPool, metadata: {name: q}, spec: {ipv4: {cidr: 10.60.0.0/16}}}
---
{apiVersion: fathom.network/v1alpha1, kind: IPBlock, metadata: {name: 10.50.0.0-26}, spec: {pool: p, cidr: 10.50.0.0/26, node: a}}
`)))
	if err != nil {
		t.Fatal(err)
	}
	if err := client.Apply(t.Context(), "test", objects); err != nil {
		t.Fatal(err)
	}
	// A kind is served a moment after its definition is stored.
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		err := client.Apply(t.Context(), "test", more)
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	if err := deletePools(t.Context(), client); err != nil {
		t.Error(err)
	}
	pools, err := kube.List(t.Context(), client, kube.IPPools, kube.Selection{})
	if err != nil || len(pools) > 0 {
		t.Error(pools, err)
	}
	blocks, err := kube.List(t.Context(), client, kube.IPBlocks, kube.Selection{})
	if err != nil || len(blocks) > 0 {
		t.Error(blocks, err)
	}
}
