{{/* Pods of this release, by component, as peers of a NetworkPolicy. Takes a dict with root and components. */}}
{{- define "impala.peers" -}}
{{- range .components }}
- podSelector:
    matchLabels:
      {{- include "impala.selectorLabels" (dict "root" $.root "component" .) | nindent 6 }}
{{- end }}
{{- end }}

{{/* What the policies of all roles have in common: whom they are for, and who reads metrics.
Takes a dict with root and component; the template goes on with further rules of `ingress`. */}}
{{- define "impala.networkPolicySpec" -}}
{{- $policy := .root.Values.networkPolicy -}}
podSelector:
  matchLabels:
    {{- include "impala.selectorLabels" . | nindent 4 }}
policyTypes: [Ingress{{ if $policy.restrictEgress }}, Egress{{ end }}]
{{- if $policy.restrictEgress }}
egress:
  - to:
      - podSelector:
          matchLabels:
            app.kubernetes.io/name: impala
            app.kubernetes.io/instance: {{ .root.Release.Name }}
  - ports:
      - {protocol: UDP, port: 53}
      - {protocol: TCP, port: 53}
{{- end }}
ingress:
  - ports:
      - {protocol: TCP, port: 9400}
    {{- with $policy.metricsFrom }}
    from:
      {{- include "impala.peers" (dict "root" $.root "components" (list "test")) | nindent 6 }}
      {{- toYaml . | nindent 6 }}
    {{- end }}
{{- end }}
