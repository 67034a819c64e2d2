// Package policyconformance runs the conformance tests of sigs.k8s.io/network-policy-api against a cluster, as upstream's own program does, and
// leaves out what wants a kernel that can do SCTP where this one cannot: `make conformance-policy`, docs/conformance.md.
package policyconformance

import (
	"context"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/config"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	api "sigs.k8s.io/network-policy-api/apis/v1beta1"
	"sigs.k8s.io/network-policy-api/conformance/tests"
	"sigs.k8s.io/network-policy-api/conformance/utils/flags"
	"sigs.k8s.io/network-policy-api/conformance/utils/suite"
	"sigs.k8s.io/yaml"
)

func must[T any](x T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return x
	}
}

// TestConformance runs all tests of the profile ClusterNetworkPolicy and writes the report, if the flags say where.
func TestConformance(t *testing.T) {
	for _, add := range []error{api.Install(scheme.Scheme), apiextensionsv1.AddToScheme(scheme.Scheme)} {
		if add != nil {
			t.Fatal(add)
		}
	}
	kubeconfig := must(config.GetConfig())(t)
	whole := must(client.NewWithWatch(kubeconfig, client.Options{Scheme: scheme.Scheme}))(t)
	o := suite.Options{
		Client: whole, ClientSet: must(kubernetes.NewForConfig(kubeconfig))(t), KubeConfig: *kubeconfig,
		EnableAllSupportedFeatures: true, CleanupBaseResources: true,
	}
	if !hasSCTP(t) {
		t.Log("this kernel has no SCTP sockets: tests of SCTP are left out, and count as skipped in the report")
		o.Client = interceptor.NewClient(whole, interceptor.Funcs{Create: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.CreateOption) error {
			if u, ok := o.(*unstructured.Unstructured); ok {
				withoutSCTP(t, u)
			}
			return c.Create(ctx, o, opts...)
		}})
		o.SkipTests = ofSCTP()
	}
	about := must(suite.ParseImplementation(*flags.ImplementationOrganization, *flags.ImplementationProject, *flags.ImplementationURL,
		*flags.ImplementationVersion, *flags.ImplementationContact, *flags.ImplementationAdditionalInformation))(t)
	s := must(suite.NewConformanceProfileTestSuite(suite.ConformanceProfileOptions{
		Options: o, Implementation: *about, ConformanceProfiles: suite.ParseConformanceProfiles("ClusterNetworkPolicy"),
	}))(t)
	s.Setup(t)
	if err := s.Run(t, tests.ConformanceTests); err != nil {
		t.Fatal(err)
	}
	report := must(yaml.Marshal(must(s.Report())(t)))(t)
	t.Logf("report:\n%s", report)
	if path := *flags.ReportOutput; path != "" {
		if err := os.WriteFile(path, report, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// hasSCTP says whether the kernel has sockets of SCTP.
func hasSCTP(t *testing.T) bool {
	return regexp.MustCompile(`(?m)^SCTP\s`).Match(must(os.ReadFile("/proc/net/protocols"))(t))
}

// withoutSCTP takes from a StatefulSet the containers that listen for SCTP: where they cannot, they end, and no pod of the suite gets ready.
func withoutSCTP(t *testing.T, o *unstructured.Unstructured) {
	path := []string{"spec", "template", "spec", "containers"}
	containers, found, err := unstructured.NestedSlice(o.Object, path...)
	if o.GetKind() != "StatefulSet" || !found || err != nil {
		return
	}
	containers = slices.DeleteFunc(containers, func(c any) bool { return strings.Contains(string(must(yaml.Marshal(c))(t)), "SERVE_SCTP_PORT_") })
	if err := unstructured.SetNestedSlice(o.Object, containers, path...); err != nil {
		t.Error(err)
	}
}

// ofSCTP are the tests that connect by SCTP: some by nothing else, and the others beside TCP and UDP, within the same subtest.
func ofSCTP() (names []string) {
	for _, test := range tests.ConformanceTests {
		for _, end := range []string{"SCTP", "TierGress", "EgressInlineCIDRPeers", "EgressNodePeers", "PortRange"} {
			if strings.HasSuffix(test.ShortName, end) {
				names = append(names, test.ShortName)
			}
		}
	}
	return names
}
