package topology

import (
	"fmt"
	"strings"
	"testing"
)

func TestMaxPods(t *testing.T) {
	for _, tc := range []struct {
		cluster       string // fields of the only cluster
		plane, worker int
	}{
		{"", 110, 110},
		{"nodeCIDRMask: 25", 110, 110},
		// 61 addresses, the agent, and on the control plane four static pods.
		{"nodeCIDRMask: 26", 66, 62},
		{"nodeCIDRMask: 29", 10, 6},
		{"{nodeCIDRMask: 26, network: bridge}", 66, 62}, // kube-proxy
		{"{nodeCIDRMask: 26, network: flannel}", 67, 63},
		{"{nodeCIDRMask: 26, network: flannel, proxy: none}", 66, 62},
		{"{nodeCIDRMask: 26, dns: node-cache}", 67, 63},
		{"{nodeCIDRMask: 26, network: none}", 110, 110},
		{"{nodeCIDRMask: 26, kubeletArgs: {max-pods: [20, 30]}}", 30, 30},
		{"ipFamily: ipv6", 110, 110},
		{"{ipFamily: ipv6, podCIDR: 'fd00:1::/116', nodeCIDRMask: 123}", 35, 31},
		{"{ipFamily: dual, nodeCIDRMask: '24,64'}", 110, 110},
		// The smaller of the two ranges counts.
		{"{ipFamily: dual, podCIDR: '10.1.0.0/16,fd00:1::/116', nodeCIDRMask: '24,123'}", 35, 31},
	} {
		fields := strings.TrimSuffix(strings.TrimPrefix(tc.cluster, "{"), "}")
		file := fmt.Sprintf("apiVersion: fathom.network/v1alpha1\nkind: Lab\nclusters: [{name: east, %s}]\n", fields)
		lab, err := Parse([]byte(file), "lab.yaml", Overrides{})
		if err != nil {
			t.Errorf("%s: %v", tc.cluster, err)
			continue
		}
		c := &lab.Clusters[0]
		if plane, worker := c.MaxPods(&c.Nodes[0]), c.MaxPods(&c.Nodes[1]); plane != tc.plane || worker != tc.worker {
			t.Errorf("%s: %d and %d pods, want %d and %d", tc.cluster, plane, worker, tc.plane, tc.worker)
		}
	}
	for fields, want := range map[string]string{
		"kubeletArgs: {max-pods: many}":                                     "want a number of pods from 1 up",
		"kubeletArgs: {max-pods: 0}":                                        "want a number of pods from 1 up",
		"network: bridge, nodeCIDRMask: 26, kubeletArgs: {max-pods: 63}":    `"63": the range of a node, such as 10.244.0.64/26, has addresses for 62 pods`,
		"network: bridge, nodeCIDRMask: 26, kubeletArgs: {max-pods: 62}":    "",
		"network: bridge, kubeletArgs: {max-pods: 250}":                     "",
		"network: none, nodeCIDRMask: 26, kubeletArgs: {max-pods: 250}":     "",
		"network: fathom, nodeCIDRMask: 26, kubeletArgs: {max-pods: '250'}": "", // of pools
	} {
		file := fmt.Sprintf("apiVersion: fathom.network/v1alpha1\nkind: Lab\nclusters: [{name: east, %s}]\n", fields)
		_, err := Parse([]byte(file), "lab.yaml", Overrides{})
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, want %q", fields, err, want)
		}
	}
}
