package kube

import (
	"bytes"
	"context"
	"net/netip"
	"strings"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/rest"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/deploy"
	"github.com/fathom-network/fathom/internal/facts/ippool"
	"github.com/fathom-network/fathom/internal/testenv"
)

// TestPoolsOfServer asks a real API server: whether it takes the CRDs, what their rules refuse and in what words,
// that the client and the view speak its language.
func TestPoolsOfServer(t *testing.T) {
	c, err := Connect(testenv.APIServer(t))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()

	// A view of a cluster without the kinds is not waited for.
	changed := make(chan struct{}, 1000)
	view := c.View(ctx, "a", func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	})
	await(t, "a view without the CRDs", view.Synced)
	if blocks, err := List(ctx, c, IPBlocks, Selection{}); err != nil || len(blocks) > 0 {
		t.Errorf("blocks without the CRD: %v, %v", blocks, err)
	}

	objects, err := Decode(bytes.NewReader(deploy.Manifests()))
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Apply(ctx, "test", objects); err != nil {
		t.Fatal(err)
	}
	dynamic, err := c.dynamic()
	if err != nil {
		t.Fatal(err)
	}
	pools := dynamic.Resource(v1alpha1.GroupVersion.WithResource("ippools"))
	pool := func(name, spec string) *unstructured.Unstructured {
		o, err := Decode(strings.NewReader("apiVersion: fathom.network/v1alpha1\nkind: IPPool\nmetadata: {name: " + name + "}\nspec: " + spec))
		if err != nil {
			t.Fatal(err)
		}
		return o[0]
	}
	for _, test := range []struct{ name, spec, want string }{
		{"v4", `{ipv4: {cidr: 10.50.0.0/16}}`, ""},
		{"v6", `{ipv6: {cidr: "fd00:50::/64", blockSize: 120}}`, ""},
		{"both", `{ipv4: {cidr: 10.51.0.0/28}, ipv6: {cidr: "fd00:51::/128"}, disabled: true, nodeSelector: {matchLabels: {a: b}}, namespaceSelector: {matchExpressions: [{key: x, operator: Exists}]}}`, ""},
		{"default", `{ipv4: {cidr: 10.52.0.0/16}}`, `metadata.name: Invalid value: "default" is the pool of the nodes' own podCIDRs`},
		{"nothing", `{}`, "spec: Invalid value: a pool has a range of IPv4, of IPv6, or both"},
		{"no-range", `{ipv4: {cidr: ten}}`, `spec.ipv4.cidr: Invalid value: "ten": want a range of IPv4 such as 10.50.0.0/16`},
		{"family4", `{ipv4: {cidr: "fd00:50::/64"}}`, `spec.ipv4.cidr: Invalid value: "fd00:50::/64": want a range of IPv4`},
		{"family6", `{ipv6: {cidr: 10.50.0.0/16}}`, `spec.ipv6.cidr: Invalid value: "10.50.0.0/16": want a range of IPv6`},
		{"mapped", `{ipv6: {cidr: "::ffff:10.50.0.0/112"}}`, `spec.ipv6.cidr`},
		{"host-bits", `{ipv4: {cidr: 10.50.0.1/16}}`, `spec.ipv4.cidr: Invalid value: "10.50.0.1/16": has bits behind the prefix; want something like 10.50.0.0/16`},
		{"too-small", `{ipv4: {cidr: 10.50.0.0/28, blockSize: 26}}`, `spec.ipv4.blockSize: Invalid value: a block cannot be larger than the range`},
		{"size4", `{ipv4: {cidr: 10.50.0.0/28, blockSize: 33}}`, `spec.ipv4.blockSize`},
		{"all", `{ipv4: {cidr: 0.0.0.0/0}}`, `spec.ipv4.cidr: Invalid value: "0.0.0.0/0": holds addresses that no pod can have`},
		{"loopback", `{ipv4: {cidr: 127.1.0.0/16}}`, `holds addresses that no pod can have`},
		{"link-local", `{ipv6: {cidr: "fe80::/64"}}`, `holds addresses that no pod can have`},
		{"multicast", `{ipv4: {cidr: 239.0.0.0/24}}`, `holds addresses that no pod can have`},
		{"unknown", `{ipv4: {cidr: 10.53.0.0/24, size: 3}}`, `unknown field "spec.ipv4.size"`},
	} {
		_, err := pools.Create(ctx, pool(test.name, test.spec), metav1.CreateOptions{FieldValidation: metav1.FieldValidationStrict})
		if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%s: %v; want %q", test.name, err, test.want)
		}
	}
	if _, err := pools.Create(ctx, pool("v4", `{ipv4: {cidr: 10.54.0.0/16}}`), metav1.CreateOptions{}); !apierrors.IsAlreadyExists(err) {
		t.Errorf("two pools of a name: %v", err)
	}
	for patch, want := range map[string]string{
		`{"spec":{"disabled":true}}`:                            "",
		`{"spec":{"ipv6":{"cidr":"fd00:59::/64"}}}`:             "",
		`{"spec":{"ipv4":{"cidr":"10.55.0.0/16"}}}`:             "spec.ipv4.cidr: Invalid value: cannot be changed; make another pool and disable this one",
		`{"spec":{"ipv4":{"blockSize":27}}}`:                    "cannot be changed",
		`{"spec":{"ipv4":null,"ipv6":{"cidr":"fd00:59::/64"}}}`: "spec.ipv4",
	} {
		_, err := pools.Patch(ctx, "v4", "application/merge-patch+json", []byte(patch), metav1.PatchOptions{})
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v; want %q", patch, err, want)
		}
	}

	// What the CRD takes, the agents take as well.
	list, err := List(ctx, c, IPPools, Selection{})
	if err != nil || len(list) != 3 {
		t.Fatalf("%d pools, %v", len(list), err)
	}
	f := ippool.Read(ippool.Objects{Pools: list})
	for _, p := range f.Pools {
		if p.Problem != nil {
			t.Errorf("%s: %s", p.Name, p.Problem)
		}
		status, differs := f.Status(p, time.Now())
		if err := SetStatus(ctx, c, IPPools, p.Name, status); err != nil || !differs {
			t.Errorf("%s: %v", p.Name, err)
		}
	}

	prefix := netip.MustParsePrefix("10.50.0.64/26")
	block := &v1alpha1.IPBlock{ObjectMeta: metav1.ObjectMeta{Name: ippool.BlockName(prefix), OwnerReferences: []metav1.OwnerReference{NodeOwner("a", "1-2")}},
		Spec: v1alpha1.IPBlockSpec{Pool: "v4", CIDR: prefix.String(), Node: "a"}}
	made, err := c.CreateBlock(ctx, block)
	if err != nil || made.UID == "" || made.Spec != block.Spec {
		t.Fatalf("%+v, %v", made, err)
	}
	if _, err := c.CreateBlock(ctx, block); !apierrors.IsAlreadyExists(err) {
		t.Errorf("made twice: %v", err)
	}
	if err := c.SetBlockOwner(ctx, made.Name, made.UID, NodeOwner("a", "3-4")); err != nil {
		t.Error(err)
	}
	if err := c.SetBlockOwner(ctx, made.Name, "another", NodeOwner("a", "3-4")); !apierrors.IsInvalid(err) {
		t.Errorf("the owner of another: %v", err)
	}
	agentsAreKeptApart(t, c, made)

	// The view finds what was installed after it began; its reflectors wait longer and longer between.
	await(t, "the blocks and pools of the view", func() bool {
		blocks := view.Blocks.All()
		return view.Pools.Len() == 3 && len(blocks) == 1 && blocks[0].OwnerReferences[0].UID == "3-4"
	})
	f = ippool.Read(ippool.Objects{Pools: view.Pools.All(), Blocks: view.Blocks.All(), Nodes: view.Nodes.All(), Services: view.ServiceCIDRs.All()})
	if p, _ := f.Pool("v4"); view.ServiceCIDRs.Len() == 0 || p.Problem != nil || len(f.Blocks) != 1 {
		t.Errorf("%+v, %d ServiceCIDRs", p, view.ServiceCIDRs.Len())
	}
	if namespace, found := view.Namespaces.Get("", "fathom-system"); !found || namespace.Labels["kubernetes.io/metadata.name"] != "fathom-system" {
		t.Errorf("%+v, %v", namespace, found)
	}
	if err := c.DeleteBlock(ctx, made.Name, "another"); !apierrors.IsConflict(err) {
		t.Errorf("delete another: %v", err)
	}
	if err := c.DeleteBlock(ctx, made.Name, made.UID); err != nil {
		t.Error(err)
	}
	if err := c.DeleteBlock(ctx, made.Name, made.UID); !apierrors.IsNotFound(err) {
		t.Errorf("deleted twice: %v", err)
	}
	if blocks, err := List(ctx, c, IPBlocks, Selection{}); err != nil || len(blocks) > 0 {
		t.Errorf("%v, %v", blocks, err)
	}
}

// agentsAreKeptApart is the agents' view of their rights: RBAC's, and what the admission policy takes away from them.
func agentsAreKeptApart(t *testing.T, c *Client, made *v1alpha1.IPBlock) {
	ctx := t.Context()
	as := func(node string) *Client {
		config := rest.CopyConfig(c.config)
		config.Impersonate = rest.ImpersonationConfig{UserName: "system:serviceaccount:fathom-system:fathom-agent",
			Groups: []string{"system:serviceaccounts", "system:authenticated"}, Extra: map[string][]string{"authentication.kubernetes.io/node-name": {node}}}
		agent, err := connect(config)
		if err != nil {
			t.Fatal(err)
		}
		return agent
	}
	a, b := as("a"), as("b")
	// A policy is in force a moment after it was made.
	await(t, "the refusal of another node's block", func() bool {
		err := b.SetBlockOwner(ctx, made.Name, made.UID, NodeOwner("a", "3-4"))
		return err != nil && strings.Contains(err.Error(), "an agent takes and gives back blocks of its own node only")
	})
	if err := b.DeleteBlock(ctx, made.Name, made.UID); !apierrors.IsInvalid(err) && !apierrors.IsForbidden(err) {
		t.Errorf("node b deletes a block of node a: %v", err)
	}
	other := made.DeepCopy()
	other.ObjectMeta = metav1.ObjectMeta{Name: "10.50.1.0-26", OwnerReferences: []metav1.OwnerReference{NodeOwner("a", "3-4")}}
	other.Spec.CIDR = "10.50.1.0/26"
	if _, err := b.CreateBlock(ctx, other); err == nil {
		t.Error("node b makes a block of node a")
	}
	mine, err := a.CreateBlock(ctx, other)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.SetBlockOwner(ctx, mine.Name, mine.UID, NodeOwner("a", "3-4")); err != nil {
		t.Error(err)
	}
	if blocks, err := List(ctx, a, IPBlocks, Selection{}); err != nil || len(blocks) != 2 {
		t.Errorf("%v, %v", blocks, err)
	}
	if err := a.DeleteBlock(ctx, mine.Name, mine.UID); err != nil {
		t.Error(err)
	}
	if err := SetStatus(ctx, a, IPPools, "v4", v1alpha1.IPPoolStatus{Nodes: 1}); err != nil {
		t.Error(err)
	}
}

func await(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !done(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: it does not come", what)
		}
	}
}
