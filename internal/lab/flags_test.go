package lab

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/fathom-network/fathom/internal/facts/topology"
)

// configFlags are the flags of kubelet that stand for fields of its configuration.
var configFlags = map[string]string{
	"authentication.anonymous.enabled": "anonymous-auth", "authentication.webhook.enabled": "authentication-token-webhook",
	"authentication.x509.clientCAFile": "client-ca-file", "authorization.mode": "authorization-mode",
	"tlsCertFile": "tls-cert-file", "tlsPrivateKeyFile": "tls-private-key-file",
	"clusterDomain": "cluster-domain", "clusterDNS": "cluster-dns", "containerRuntimeEndpoint": "container-runtime-endpoint",
	"staticPodPath": "pod-manifest-path", "resolvConf": "resolv-conf", "cgroupDriver": "cgroup-driver", "cgroupsPerQOS": "cgroups-per-qos",
	"enforceNodeAllocatable": "enforce-node-allocatable", "failCgroupV1": "fail-cgroupv1", "failSwapOn": "fail-swap-on",
	"serializeImagePulls": "serialize-image-pulls", "localStorageCapacityIsolation": "local-storage-capacity-isolation",
	"evictionHard": "eviction-hard", "imageGCHighThresholdPercent": "image-gc-high-threshold", "oomScoreAdj": "oom-score-adj",
	"configMapAndSecretChangeDetectionStrategy": "config-map-and-secret-change-detection-strategy", "featureGates": "feature-gates",
	"maxPods": "max-pods",
}

// parsed is the first cluster of a lab file's lab, with what kubeadm is told of its first node.
func parsed(t *testing.T, file string, o topology.Overrides) (l *Lab, c *topology.Cluster, kubeadm []byte) {
	t.Helper()
	facts, err := topology.Parse([]byte(file), "lab.yaml", o)
	if err != nil {
		t.Fatal(err)
	}
	facts.Underlay4, facts.Underlay6 = netip.MustParsePrefix("10.201.0.0/16"), netip.MustParsePrefix("fd00:fa:201::/48")
	l = &Lab{Lab: *facts, Paths: Paths{State: t.TempDir()}}
	c = &l.Clusters[0]
	if kubeadm, err = l.kubeadmFile(c, &c.Nodes[0]); err != nil {
		t.Fatal(err)
	}
	return l, c, kubeadm
}

// What a component is started with, by kubeadm or by the lab, a lab file may set only if that was thought of.
func TestFlagsAreKnown(t *testing.T) {
	known := func(c topology.Component, name string) {
		t.Helper()
		if _, is := topology.Flag(c, name); !is {
			t.Errorf("%s is started with --%s, and topology's table of flags does not have it: say why a user may not set it, or that one may", c, name)
		}
	}
	golden, err := os.ReadFile("testdata/flags.txt")
	if err != nil {
		t.Fatal(err)
	}
	lines := 0
	for line := range strings.Lines(string(golden)) {
		if component, name, found := strings.Cut(strings.TrimSpace(line), " "); found && component != "#" {
			known(topology.Component(component), name)
			lines++
		}
	}
	if lines < 50 {
		t.Fatalf("only %d flags in testdata/flags.txt", lines)
	}

	for _, o := range []topology.Overrides{{}, {IPFamily: "dual"}, {ControlPlanes: new(3)}} {
		l, c, data := parsed(t, "apiVersion: fathom.network/v1alpha1\nkind: Lab\ndefaults: {featureGates: {AllAlpha: false}}\nclusters: [{name: east}]\n", o)
		var conf struct {
			APIServer         struct{ ExtraArgs []arg } `json:"apiServer"`
			ControllerManager struct{ ExtraArgs []arg } `json:"controllerManager"`
			Scheduler         struct{ ExtraArgs []arg } `json:"scheduler"`
		}
		for doc := range bytes.SplitSeq(data, []byte("---\n")) {
			if bytes.Contains(doc, []byte("kind: ClusterConfiguration")) {
				if err := yaml.Unmarshal(doc, &conf); err != nil {
					t.Fatal(err)
				}
			}
		}
		for component, args := range map[topology.Component][]arg{
			topology.APIServer: conf.APIServer.ExtraArgs, topology.ControllerManager: conf.ControllerManager.ExtraArgs, topology.Scheduler: conf.Scheduler.ExtraArgs,
		} {
			if len(args) == 0 {
				t.Errorf("kubeadm is told no flag of %s", component)
			}
			for _, a := range args {
				known(component, a.Name)
			}
		}
		for _, s := range l.spec(c, &c.Nodes[1], "").Services {
			if s.Name != kubeletService {
				continue
			}
			for _, a := range s.Args[1:] {
				name, _, _ := strings.Cut(strings.TrimPrefix(a, "--"), "=")
				known(topology.Kubelet, name)
			}
		}
		var fields func(prefix string, m map[string]any)
		fields = func(prefix string, m map[string]any) {
			for key, value := range m {
				if name, is := configFlags[prefix+key]; is {
					known(topology.Kubelet, name)
				} else if inner, is := value.(map[string]any); is {
					fields(prefix+key+".", inner)
				} else if prefix+key != "apiVersion" && prefix+key != "kind" {
					t.Errorf("kubelet is configured with %s: add the flag that stands for it to this test", prefix+key)
				}
			}
		}
		fields("", kubeletConfig(c, &c.Nodes[1]))
	}
}

// A user's flags stand in the place of the lab's, each as often as it has values, and the files that they name are where
// kube-apiserver sees them.
func TestUsersFlags(t *testing.T) {
	l, c, data := parsed(t, `apiVersion: fathom.network/v1alpha1
kind: Lab
clusters:
- name: east
  apiServerArgs: {service-account-issuer: [https://new, https://old], enable-admission-plugins: NodeRestriction}
  apiServerVolumes: [{hostPath: audit, mountPath: /etc/audit, readOnly: true}]
  controllerManagerArgs: {kube-api-qps: 7}
  kubeletArgs: {v: [1, 2], max-pods: 40}
`, topology.Overrides{Dir: "/root/lab"})
	for _, want := range []string{
		"  - name: service-account-issuer\n    value: https://new\n  - name: service-account-issuer\n    value: https://old\n",
		"  - name: kube-api-qps\n    value: \"7\"\n",
		"  - hostPath: /etc/kubernetes/volumes/0\n    mountPath: /etc/audit\n    name: volume-0\n    pathType: \"\"\n    readOnly: true\n",
	} {
		if !strings.Contains(string(data), want) {
			t.Errorf("kubeadm's configuration has no\n%s\nbut\n%s", want, data)
		}
	}
	for i, n := range c.Nodes {
		if pods := l.nodeObject(c, &c.Nodes[i]).Status.Capacity.Pods(); pods.Value() != 40 || kubeletConfig(c, &c.Nodes[i])["maxPods"] != 40 {
			t.Errorf("node %s is registered with room for %v pods, and its kubelet configured with %v; want 40", n.Name, pods, kubeletConfig(c, &c.Nodes[i])["maxPods"])
		}
		spec := l.spec(c, &c.Nodes[i], "")
		if got, want := fmt.Sprint(spec.Binds), "[{/root/lab/audit /etc/kubernetes/volumes/0 true}]"; (got == want) != (n.Role == topology.ControlPlane) {
			t.Errorf("node %s has the mounts %s", n.Name, got)
		}
		args := spec.Services[1].Args
		if !slices.Contains(args, "--v=1") || !slices.Contains(args, "--v=2") {
			t.Errorf("kubelet of %s: %q", n.Name, args)
		}
	}
}
